"""Tables of labels beside images: whose columns and images are found, and what is left out, with a word."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw_folder, draw_picture, opened

from equipoise import UserError
from equipoise.data.sources import find_parts


@pytest.fixture
def images(tmp_path):
    """img/0.png to img/5.png."""
    draw_folder(tmp_path, {"img": 6})
    return tmp_path


def write(root, text, name="labels.csv", encoding="utf-8"):
    (root / name).write_text(text, encoding)
    return root / name


LABELS = ("cat", "dog", "cat", "owl", "cat", "dog")
SIX = "filename,label\n" + "".join(f"{number}.png,{name}\n" for number, name in enumerate(LABELS))


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        (SIX, "labels.csv", "utf-8"),
        (SIX.replace(",", ";"), "labels.csv", "utf-8-sig"),  # Excel, where the comma divides decimals
        (SIX.replace(",", "\t").replace("\n", "\r\n"), "labels.tsv", "utf-16"),  # Excel's "Unicode text"
        (SIX.replace(".png", ""), "train.csv", "utf-8"),  # ids, as competitions have them
        (SIX.replace("filename", "Image Path").replace("\n", "\nC:\\me\\img\\", 6), "labels.csv", "utf-8"),
        (SIX.replace("\n", "\nhttps://museum.example/img/", 6).replace(".png", ".png?size=1"), "a.csv", "utf-8"),
        (SIX.replace("label", "weight,species").replace("png,", "png,2.5,"), "labels.csv", "utf-8"),
        (SIX.replace("filename,label", ",file,kind").replace("\n", "\n7,", 6), "labels.csv", "utf-8"),  # pandas' index
        (SIX.replace("cat", " cat ").replace("dog", '"dog"'), "labels.csv", "utf-8"),
    ],
)
def test_tables_as_programs_write_them(text, name, encoding, images):
    file = write(images, text.replace("\n7,https", "\nhttps"), name, encoding)
    for path in (images, file):
        train = opened(path).train
        assert train.class_names == ("cat", "dog", "owl")
        assert train.class_counts == (3, 2, 1)
        assert train.images.name(3) == str(images / "img" / "3.png")


def test_a_parquet_table(images):
    table = {"image_id": list(range(6)), "score": [0.5] * 6, "label": pa.array([3, 1, 3, 10, 3, 1])}
    pq.write_table(pa.table(table), images / "labels.parquet")
    found = find_parts(str(images))
    assert found.parts["train"].class_names == ("1", "3", "10"), "numbers, by their values"
    assert found.described == [f"{images}/labels.parquet: images by 'image_id', labels by 'label'"]


def test_parts_and_groups_of_a_table(images):
    rows = "0,a,train,x\n1,b,Train,x\n2,a,train,y\n3,b,val,y\n4,a,test,z\n5,b,test,z\n"
    write(images, "image,label,split,specimen\n" + rows)
    parts = opened(images, group_by="specimen")
    assert [part.class_counts for part in parts.named().values()] == [(2, 1), (0, 1), (1, 1)]
    assert parts.train.groups_N.tolist() == ["x", "x", "y"]
    shared = "1 group of the train part are in the validation part too (first: y): figures would be too good"
    assert parts.notes == [shared]


def test_a_column_that_divides_something_else_is_no_split(images):
    write(images, SIX.replace("label", "label,set").replace("\n", ",2020\n").replace("set,2020", "set"))
    assert list(opened(images).named()) == ["train"]


def test_tables_named_as_parts(images):
    """As competitions have them: the test images have no labels, and file names repeat."""
    draw_picture(images / "test_images" / "0.png", 1, 1)
    draw_folder(images, {"train_images": 6})
    for file in (images / "img").iterdir():
        file.unlink()
    write(images, "id,class\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(6)), "train.csv")
    write(images, "id\n0\n", "test.csv")
    write(images, "id,class\n0,a\n", "sample_submission.csv")
    parts = opened(images)
    assert parts.train.class_counts == (3, 3)
    assert parts.test is None
    assert [note.partition(":")[0] for note in parts.notes] == [
        "passed over",
        f"1 image below {images} named by no row, or by one that was left out (first",
    ]
    assert parts.train.images.name(0) == str(images / "train_images" / "0.png")
    other = draw_folder(images.parent / f"{images.name}-elsewhere", {"x": 6})
    assert opened(other, train_list=str(images / "train.csv")).train.class_counts == (3, 3), "a table elsewhere"


def test_one_column_a_class(images):
    marks = ["1,0,0", "0,1,0", "1,0,0", "0,0,1.0", "1,1,0", "0,0,0"]
    write(images, "image,MEL,NV,BCC\n" + "".join(f"{number},{mark}\n" for number, mark in enumerate(marks)))
    found = find_parts(str(images))
    assert found.parts["train"].class_names == ("BCC", "MEL", "NV")
    assert found.parts["train"].class_counts == (1, 2, 1)
    assert f"{images}/labels.csv: left out: 2 rows without one label or part (first: row 6)" in found.notes


def test_what_is_left_out_is_told(images):
    rows = ["0.png,cat", "0.png,cat", "1.png,dog", "1.png,cat", "2.png,", "3.png,dog"]
    write(images, "filename,label\n" + "\n".join(rows))
    found = find_parts(str(images))
    assert found.parts["train"].class_counts == (1, 1)
    assert found.notes == [
        f"{images}/labels.csv: left out: 1 row without one label or part (first: row 6)",
        f"{images}/labels.csv: left out: 1 image with several labels (first: img/1.png)",
        f"4 images below {images} named by no row, or by one that was left out (first: img/1.png)",
    ]


def test_images_that_are_missing(images):
    write(images, SIX + "9.png,owl\n")
    with pytest.raises(UserError, match=r"labels.csv: 1 image not found below .* \(first: '9.png'\); .* skip"):
        opened(images)
    parts = opened(images, on_bad_image="skip")
    assert parts.train.class_counts == (3, 2, 1)
    assert parts.notes == [f"{images}/labels.csv: 1 image not found below {images} (first: '9.png'), left out"]


def test_one_file_name_in_several_folders(images):
    draw_picture(images / "old" / "0.png", 1, 1)
    write(images, SIX)
    with pytest.raises(UserError, match=r"row 2: '0.png' may be img/0.png or old/0.png: write the path of the one"):
        opened(images)
    write(images, SIX.replace("\n0.png", "\nold/0.png"))
    assert opened(images).train.images.name(0) == str(images / "old" / "0.png")
    (images / "old").rename(images / "cat")
    write(images, SIX)
    assert opened(images).train.images.name(0) == str(images / "cat" / "0.png"), "the folder of its class"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("filename,label\n", "labels.csv has no rows below its heading"),
        ("", "labels.csv has no rows below its heading"),
        ("filename,label\n0.png\n", "labels.csv, row 2 has 1 cell, but its heading names 2 columns"),
        ("0.png,cat\n1.png,dog\n", "labels.csv has no heading: write one above its first row, as filename,label"),
        (
            "a,b,c\n0.png,x,y\n",
            "which column has the labels? name it with --set 'data.label_column=NAME'; there are 'b'",
        ),
        ("a,label\nz.png,x\n", "no column names images below its folder (columns: 'a', 'label'; the first row"),
    ],
)
def test_refused_tables(text, sentence, images):
    write(images, text)
    with pytest.raises(UserError) as error:
        opened(images)
    assert sentence in str(error.value)


def test_more_refusals(images):
    (images / "labels.csv").write_bytes("filename,label\n0.png,\xe9pi\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not in UTF-8: save it as 'CSV UTF-8'"):
        opened(images)
    write(images, SIX)
    with pytest.raises(UserError, match=r"has no column 'kind' \(data.label_column\); it has 'filename', 'label'"):
        opened(images, label_column="kind")
    write(images, SIX, "other.csv")
    with pytest.raises(UserError, match=r"several tables with labels \(labels.csv, other.csv\): name the one"):
        opened(images)
    write(images, "image,label,split\n0,a,train\n1,A,val\n")
    with pytest.raises(UserError, match="class 'A' is 'a' in the train part: they differ in capitals, blanks"):
        opened(images / "labels.csv")
    write(images, "image,label,split\n0,a,train\n1,b,train\n0,a,val\n")
    with pytest.raises(UserError, match="1 image of the validation part are in the train part too"):
        opened(images / "labels.csv")


def test_class_folders_with_another_table_beside_them(pictures):
    write(pictures, "file,class_1,probability_1\nant/0.png,ant,0.9\n", "predictions.csv")
    found = find_parts(str(pictures))
    assert found.kind == "class folders"
    assert found.notes[0].startswith(f"no table of labels: {pictures}/predictions.csv: which column has the labels?")


def test_an_index_column_is_not_the_images(images):
    """The numbers of rows are also the names of files without their endings."""
    rows = "".join(f"{5 - number},{number}.png,{name}\n" for number, name in enumerate(LABELS))
    write(images, "id,filename,label\n" + rows)
    train = opened(images).train
    assert [train.class_names[label] for label in train.labels_N] == list(LABELS)
    assert train.images.name(0) == str(images / "img" / "0.png")
    write(images, "one,two,label\n" + "".join(f"{5 - number},{number},x\n" for number in range(6)))
    with pytest.raises(UserError, match="which column names the images, one or two"):
        opened(images)


def test_parts_that_a_table_does_not_say(images):
    write(images, "file,label,split\n0,a,train\n1,b,train\n2,a,dev\n")
    with pytest.raises(UserError, match="column 'split' says 'dev', which is no part: write train, val or test"):
        opened(images)
    write(images, "file,label,split\n0,a,train\n1,b,train\n2,a,\n3,a,test\n")
    found = find_parts(str(images))
    assert {name: len(part) for name, part in found.parts.items()} == {"train": 2, "test": 1}
    assert f"{images}/labels.csv: left out: 1 row without one label or part (first: row 4)" in found.notes


def test_groups_of_which_some_are_empty(images):
    write(images, "file,label,group\n0,a,\n1,b,x\n2,a,x\n3,b,\n")
    assert opened(images).train.groups_N.tolist() == ["img/0.png", "x", "x", "img/3.png"]
    write(images, "file,label,group\n0,a,\n1,b,\n")
    assert opened(images).train.groups_N is None


def test_a_table_beside_divided_class_folders(tmp_path):
    """It says the classes again, but not the parts."""
    draw_folder(tmp_path, {f"{part}/{name}": 2 for part in ("train", "test") for name in ("cat", "dog")})
    paths = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.png"))]
    write(tmp_path, "file,label\n" + "".join(f"{path},{path.parent.name}\n" for path in paths))
    found = find_parts(str(tmp_path))
    assert {name: len(part) for name, part in found.parts.items()} == {"train": 4, "test": 4}
    assert found.notes[-1].startswith("passed over, as it does not say the parts: ")
    write(tmp_path, "a,b\n1\n")
    assert "labels.csv, row 2 has 1 cell" in find_parts(str(tmp_path)).notes[-1], "nor does a broken table stop it"


def test_what_a_table_cannot_have(images):
    for text, sentence in {
        "file,label\n0,\n1,\n": "no row is left that has one label and an image",
        "file,label,label\n0,a,b\n": "has two columns called 'label'",
    }.items():
        write(images, text)
        with pytest.raises(UserError, match=sentence):
            opened(images)


def test_files_that_differ_in_capitals(images):
    draw_picture(images / "img" / "a.png", 1, 1)
    draw_picture(images / "img" / "A.png", 1, 2)
    write(images, "file,label\na.png,x\nA.png,y\n")
    assert opened(images).train.class_counts == (1, 1)


def test_images_that_no_program_reads_and_lost_classes(images):
    (images / "img" / "7.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(60))
    write(images, "file,label\n0.png,a\n1.png,b\n7.heic,c\n")
    with pytest.raises(UserError, match=r"1 image not found .*7.heic', HEIC.* all of 1 class, as 'c'; put"):
        opened(images)
    assert "1 file below" in opened(images, on_bad_image="skip").notes[-1]


def test_several_words_in_a_label(images):
    write(images, "file,label\n0,cat|dog\n1,cat\n2,emu\n3,salt; pepper\n")
    found = find_parts(str(images))
    assert found.parts["train"].class_names == ("cat", "emu", "salt; pepper"), "its words are no classes"
    assert "1 image with several labels (first: img/0.png)" in found.notes[0]


def test_the_example_of_the_docs(images):
    (images / "img" / "0.png").rename(images / "IMG_0001.jpg")
    write(images, "filename,label,split,group\nIMG_0001.jpg,cat,train,garden-3\n1.png,dog,train,\n")
    assert opened(images).train.groups_N.tolist() == ["garden-3", "img/1.png"]


def test_a_table_of_something_else_beside_class_folders(pictures):
    """Its one further column is no label: only where there are no class folders is it taken for one."""
    rows = "".join(f"{name}/{number}.png,{'xyz'[number % 3]}\n" for name in ("ant", "bee") for number in range(6))
    write(pictures, "filename,photographer\n" + rows, "metadata.csv")
    found = find_parts(str(pictures))
    assert found.parts["train"].class_names == ("ant", "bee", "cat")
    assert "metadata.csv: which column has the labels?" in found.notes[-1]


def test_a_competition_whose_labels_have_another_name(images):
    """Its test table has none, and ids are no labels."""
    write(
        images,
        "id,image,breed\n" + "".join(f"{number + 70},{number},{'ab'[number % 2]}\n" for number in range(6)),
        "train.csv",
    )
    write(images, "id,image\n90,0\n91,1\n", "test.csv")
    assert opened(images).train.class_names == ("a", "b")
    assert opened(images, label_column="breed").train.class_names == ("a", "b")

"""Two tables that are one: camera-trap packages and museum exports."""

import pytest
from conftest import draw_folder

from equipoise import UserError
from equipoise.data.sources import find_parts

MEDIA = """mediaID,deploymentID,timestamp,filePath,fileName
m0,d1,2024-05-01T10:00:00+0200,https://example.org/m/0,0.png
m1,d1,2024-05-01T10:00:05+0200,media/img,1.png
m2,d2,2024-05-01T10:00:00+0200,media/img,2.png
m3,d1,2024-05-02T10:00:00+0200,media/img,3.png
m4,d1,2024-05-03T10:00:00+0200,media/img,4.png
m5,d1,2024-05-04T10:00:00+0200,media/img,5.png
"""
OBSERVATIONS = """deploymentID,mediaID,eventID,eventStart,eventEnd,observationLevel,observationType,scientificName
d1,,e1,2024-05-01T10:00:00+02:00,2024-05-01T10:01:00+02:00,event,animal,Vulpes vulpes
d1,m3,e2,,,media,blank,
d2,m2,e3,,,media,animal,Meles meles
d1,m4,e4,,,media,animal,Meles meles
d1,m4,e4,,,media,animal,Vulpes vulpes
d1,m5,e5,,,media,unclassified,
"""


def test_a_camera_trap_package(tmp_path):
    """By image, by event, and what nobody named is left out."""
    draw_folder(tmp_path, {"img": 6})
    (tmp_path / "media.csv").write_text(MEDIA)
    (tmp_path / "observations.csv").write_text(OBSERVATIONS)
    found = find_parts(str(tmp_path))
    train = found.parts["train"]
    named = {train.images.name(index)[-5]: train.class_names[label] for index, label in enumerate(train.labels_N)}
    assert named == {"0": "Vulpes vulpes", "1": "Vulpes vulpes", "2": "Meles meles", "3": "blank"}
    assert found.described == [f"{tmp_path}/media.csv: images by 'fileName', labels by 'scientificName'"]
    assert found.notes[:2] == [
        f"{tmp_path}/media.csv: left out: 1 row without one label or part (first: row 8)",
        f"{tmp_path}/media.csv: left out: 1 image with several labels (first: img/4.png)",
    ]
    (tmp_path / "media.csv").write_text(MEDIA.replace("mediaID", "id"))
    with pytest.raises(UserError, match=r"are not as Camtrap DP has them \(no column 'mediaID'"):
        find_parts(str(tmp_path))

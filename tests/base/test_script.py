"""Scripts without a guard, under each way to start processes."""

import subprocess
import sys

import pytest

SCRIPT = """\
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1])
from equipoise.base.script import refuse_unguarded_script

def main():
    refuse_unguarded_script()
    print("goes on")

"""
GUARDED = 'if __name__ == "__main__":\n    main()\n'


@pytest.mark.parametrize(
    ("method", "call", "refused"),
    [
        ("spawn", "main()\n", True),
        ("forkserver", "main()\n", True),
        ("spawn", "if sys.argv:\n    main()\n", True),
        ("spawn", GUARDED, False),
        ("forkserver", f"try:\n    pass\nfinally:\n    {GUARDED.replace('  main', '        main')}", False),
        ("fork", "main()\n", False),
    ],
)
def test_an_unguarded_script_is_refused_where_processes_import_it(method, call, refused, tmp_path):
    script = tmp_path / "my script.py"
    script.write_text(SCRIPT + call)
    done = subprocess.run([sys.executable, script, method], capture_output=True, text=True, check=False)
    assert done.stdout == ("" if refused else "goes on\n")
    assert (done.returncode, done.stderr == "") == (int(refused), not refused)
    if refused:
        assert done.stderr.splitlines()[-1].endswith(
            f"UserError: {script}: loader processes import this script, and would run it again; put what must run once "
            'under if __name__ == "__main__": or set workers=0'
        )


@pytest.mark.parametrize("words", [["-c", SCRIPT + "main()"], ["-m", "package"]])
def test_what_no_process_imports_needs_no_guard(words, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(SCRIPT + "main()\n")
    done = subprocess.run([sys.executable, *words, "spawn"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("goes on\n", "")

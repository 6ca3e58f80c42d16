"""The report of a benchmark run says what was measured, and touches nothing else."""

import json
import sys

import pytest
from environments import ROOT

for library in ("matplotlib", "tabulate", "pytest_benchmark"):
    pytest.importorskip(library)

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_autoregressive as masked  # noqa: E402
import report  # noqa: E402
from bench_planar_flow import Case  # noqa: E402

SHARED, NETWORK = Case(50, 3, 4), masked.SMOKE[1]
FACTS = {"device_name": "Some Chip", "threads": 2, "cores": 2, "torch": "2.11.0"}
FACTS |= {"python": "3.12.0", "fastflow": "0.1.0"}


def entry(
    contender,
    direction="forward",
    case=SHARED,
    seconds=1e-3,
    over=None,
    share=None,
    op="planar_flow",
):
    own = {
        "op": op,
        "case": str(case),
        "direction": direction,
        "contender": contender,
        "backend": contender.removeprefix("fastflow-") if "fastflow" in contender else None,
        "median_seconds": seconds,
        "speedup_over": {
            rival: {"median": value, "q1": 0.9 * value, "q3": 1.1 * value}
            for rival, value in (over or {}).items()
        },
        "errors": {"z_K": 1e-7, "ladj": 2e-7},
        "D": case.D,
        "gbps": 1.0,
        "share_of_copy": share,
    }
    return {"name": contender, "extra_info": own}


@pytest.fixture
def write_json(tmp_path):
    def write(*entries, device="cpu", load=0.1):
        path = tmp_path / f"{device}.json"
        facts = {"fastflow": FACTS | {"device": device, "load": load}}
        path.write_text(json.dumps({"machine_info": facts, "benchmarks": list(entries)}))
        return path

    return write


class TestReport:
    def test_takes_the_fastest_backend_and_marks_where_it_is_slower(self, write_json):
        path = write_json(
            entry("fastflow-cpp", seconds=1e-3, over={"eager": 12.34, "compile": 0.8}),
            entry("fastflow-reference", seconds=5e-3, over={"eager": 2.0, "compile": 0.1}),
            entry("eager", seconds=12.34e-3),
            entry("compile", seconds=0.8e-3),
        )
        run = report.load(path)
        lines = report.summary(run, run.rows).splitlines()
        assert len(lines) == 3
        assert "| cpp " in lines[2] and "| 12.3x " in lines[2] and "| **0.80x** ▼ " in lines[2]
        assert "normflows" not in lines[0]

    def test_shows_seconds_for_gpus_only(self, write_json):
        for device, shown in (("cpu", False), ("cuda", True)):
            own = entry("fastflow-cpp", seconds=42e-6, over={"eager": 2.0}, share=0.5)
            run = report.load(write_json(own, entry("eager"), device=device))
            assert ("42.0 µs" in report.summary(run, run.rows)) == shown
            assert "| 50% " in report.summary(run, run.rows)

    def test_says_that_the_machine_was_busy(self, write_json):
        own = entry("fastflow-cpp", over={"eager": 2.0})
        assert "busy" not in report.versions(report.load(write_json(own)))
        assert "busy" in report.versions(report.load(write_json(own, load=2.0)))

    def test_writes_page_picture_and_readme(self, write_json, tmp_path):
        path = write_json(entry("fastflow-cpp", over={"eager": 2.0}), entry("eager"))
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
        out = tmp_path / "results"
        assert report.main([str(path), "--out", str(out), "--readme", str(readme)]) == 0
        assert (out / "planar_flow-cpu.png").read_bytes().startswith(b"\x89PNG")
        assert "Some Chip, 2 threads, PyTorch 2.11.0" in (out / "report.md").read_text()
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
        assert "(results/planar_flow-cpu.png)" in text and "stale" not in text
        report.main([str(path), "--out", str(out), "--readme", str(readme)])
        assert readme.read_text() == text

    def test_the_readme_gets_few_rows_and_every_loss(self, write_json, tmp_path):
        path = write_json(
            *(
                entry("fastflow-cpp", direction, case=Case(100, 2, K), over={"eager": K / 5})
                for K in range(1, 10)
                for direction in ("forward", "forward_backward", "inverse")
            )
        )
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        assert report.main([str(path), "--out", str(tmp_path), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.count("| shared-") == 8 and "| forward  " not in text
        assert "All 27 rows, with errors and spreads, are in [report.md](report.md)" in text
        assert "slower in 12 of 27 comparisons: shared-B100-D2-K1 forward against" in text
        assert (tmp_path / "report.md").read_text().count("| shared-") == 54

    def test_draws_the_inverse_against_d(self, write_json, tmp_path):
        path = write_json(
            *(
                entry("fastflow-cpp", direction, case, over={"eager": 2.0}, op=masked.SWEEP_OP)
                for case in masked.SWEEP["smoke"]
                for direction in case.directions
            )
        )
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        assert report.main([str(path), "--out", str(tmp_path), "--readme", str(readme)]) == 0
        picture = f"{masked.SWEEP_OP}-cpu.png"
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in readme.read_text() and "| B8-D2-" not in readme.read_text()
        assert "| B8-D2-" in (tmp_path / "report.md").read_text()

    def test_marks_what_was_timed_once_and_counts_no_floor_as_a_rival(self, write_json):
        over = {"nflows": 50.0, "dense": 0.5}
        own = entry("fastflow-cpp", "inverse", NETWORK, over=over, op=masked.OP)
        nflows = entry("nflows", "inverse", NETWORK, op=masked.OP)
        nflows["extra_info"]["rounds"] = 1
        dense = entry("dense", "inverse", NETWORK, op=masked.OP)
        run = report.load(write_json(own, nflows, dense))
        line = report.summary(run, run.rows).splitlines()[2]
        assert "| 50.0x † " in line and "| 0.50x " in line
        assert report.slower(run) == "fastflow is slower in 0 of 1 comparisons."

    def test_keeps_the_figures_it_was_made_from(self, write_json, tmp_path):
        path = write_json(entry("fastflow-cpp", over={"eager": 2.0 / 3}), entry("eager"))
        before = path.read_bytes()
        assert report.main([str(path), "--out", str(tmp_path)]) == 0
        assert path.read_bytes() == before  # it is what was measured, the copy is shorter
        for out in (tmp_path / "once", tmp_path / "twice"):
            assert report.main([str(path), "--out", str(out)]) == 0
            path = out / "cpu.json"
        pages = [(tmp_path / out / "report.md").read_text() for out in ("", "once", "twice")]
        assert len(set(pages)) == 1
        assert (tmp_path / "once" / "cpu.json").read_text() == path.read_text()
        assert "0.666667" in path.read_text()

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{", "not a JSON file"), ("{}", "no fastflow benchmarks"), (None, "No such file")],
    )
    def test_refuses_other_files_in_one_line(self, content, message, tmp_path, capsys):
        path = tmp_path / "some.json"
        if content is not None:
            path.write_text(content)
        assert report.main([str(path), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    def test_leaves_a_readme_without_marks_alone(self, write_json, tmp_path):
        path = write_json(entry("fastflow-cpp", over={"eager": 2.0}))
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.END} {report.BEGIN}")
        assert report.main([str(path), "--out", str(tmp_path), "--readme", str(readme)]) == 2
        assert readme.read_text() == f"{report.END} {report.BEGIN}"

"""Checks what the demo left behind: report, maps and printed table."""

import json
import pathlib
import re
import sys

import nibabel
import numpy as np


def main(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Fails with a sentence on the first thing that is not as it must be."""
    page = (workdir / "run" / "report.html").read_text(encoding="utf-8")
    assert "research only" in page, "the report lacks the research-only notice"
    assert page.count("data:image/png;base64,") >= 4, "the report lacks figures"
    outside = re.findall(r'(?:src|href)="(?!data:)[^"]+"', page)
    assert not outside, f"the report loads files from elsewhere: {outside}"

    results = json.loads((workdir / "run/results/test.json").read_text())
    names = list(results["scorers"])
    assert len(names) == 6, f"expected the model and five baselines, found {names}"
    table = output.read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"^{re.escape(name)} +\d\.\d+", table, re.M), (
            f"no row for {name} in the printed table"
        )

    maps = sorted((workdir / "run/maps").rglob("*anomaly*.nii.gz"))
    assert maps, "no anomaly maps were written"
    for path in maps:
        image = nibabel.load(path)
        data = np.asarray(image.dataobj)
        assert data.dtype == np.float32, f"{path.name} holds {data.dtype}"
        assert np.isfinite(data).all(), f"{path.name} is not finite"
        assert data.max() > 0, f"{path.name} is empty"
    print(f"demo: report, {len(maps)} maps and the table of {len(names)} are there")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))

"""The server on the event files of a run: TensorBoard's HTTP API and the printed address."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, simclr

from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.cli import main
from repmetrics.tensorboard import server
from repmetrics.tensorboard.opening_page import PATH

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("board")
    monitor = RepresentationMonitor(HeldOutImages(), encoder="backbone", layers=["backbone.1"])
    fit(root, simclr(), monitor)
    return root


def get(address: str, path: str) -> Any:
    with urllib.request.urlopen(urllib.parse.urljoin(address, f"/data/{path}"), timeout=10) as answer:
        return json.load(answer)


def eventually(address: str, path: str) -> Any:
    """First non-empty answer within 30 s: TensorBoard reads the files in the background."""
    for _ in range(300):
        if answer := get(address, path):
            return answer
        time.sleep(0.1)
    return pytest.fail(f"{path} stayed empty")


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own threads and sockets
def test_every_chart_of_the_layout_has_data(run_dir: Path) -> None:
    address = server.launch(run_dir, port=0)
    assert address.endswith(f"/{PATH}")
    layout = eventually(address, "plugin/custom_scalars/layout")
    (run,) = eventually(address, "runs")
    titles = [category["title"] for category in layout["category"]]
    first = ["Status", "Rank and probe", "Further metrics", "Cost"]
    assert titles == [*first, "Rank and probe of backbone.1", "Further metrics of backbone.1"]
    seen = 0
    for category in layout["category"]:
        for chart in category["chart"]:
            for series in chart.get("margin", {}).get("series", []):
                for tag in series.values():
                    points = get(address, f"plugin/scalars/scalars?{urllib.parse.urlencode({'tag': tag, 'run': run})}")
                    assert [point[1] for point in points] == [0, 6, 12], tag
                    seen += 1
            for pattern in chart.get("multiline", {}).get("tag", []):
                query = urllib.parse.urlencode({"tag": pattern, "run": run})
                answer = get(address, f"plugin/custom_scalars/scalars?{query}")
                assert answer["regex_valid"], pattern
                assert len(answer["tag_to_events"]) == 1, pattern
                assert all(answer["tag_to_events"].values()), pattern
                seen += 1
    assert seen >= 30


@pytest.mark.filterwarnings("ignore")
def test_the_opening_page_may_run_its_script_and_has_no_tab(run_dir: Path) -> None:
    address = server.launch(run_dir, port=0)
    with urllib.request.urlopen(address, timeout=10) as answer:
        html, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    script = html.partition('<script type="module">')[2].removesuffix("</script>")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert 'location.replace("../../../?" + query + "#custom_scalars&_smoothingWeight=0")' in script
    assert "custom_scalars" in get(address, "plugins_listing")
    assert "repmetrics" not in get(address, "plugins_listing")


@pytest.mark.filterwarnings("ignore")
def test_several_runs_overlay(tmp_path: Path) -> None:
    """The joint layout covers a run with error bands and a layer, and a run without both."""
    fit(tmp_path / "a", simclr(), RepresentationMonitor(HeldOutImages(), layers=["backbone.1"]), max_epochs=1)
    fit(tmp_path / "b", simclr(), RepresentationMonitor(HeldOutImages(groups=False)), max_epochs=1)
    address = server.launch(tmp_path, port=0)
    for _ in range(300):
        layout, runs = json.dumps(get(address, "plugin/custom_scalars/layout")), get(address, "runs")
        if len(runs) == 2 and "rankme_lower" in layout and "^repmetrics/rankme$" in layout:
            break
        time.sleep(0.1)
    assert sorted(runs) == ["a/lightning_logs/version_0", "b/lightning_logs/version_0"]
    assert "Rank and probe of backbone.1" in layout
    for run in runs:
        for tag in ("rankme", "odcorr_null", "linear_probe", "loss", "overhead"):
            query = urllib.parse.urlencode({"tag": f"repmetrics/{tag}", "run": run})
            assert get(address, f"plugin/scalars/scalars?{query}"), (run, tag)


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_named_by_its_folder(run_dir: Path) -> None:
    folder = next(run_dir.rglob("*tfevents*")).parent
    (run,) = eventually(server.launch(folder, port=0), "runs")
    assert run == folder.name


@pytest.mark.filterwarnings("ignore")
def test_serve_prints_the_address_and_opens_it_on_a_desktop(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    server.serve(run_dir, port=0, wait=lambda: None)
    printed = capsys.readouterr().out.strip()
    assert printed.endswith(f"/{PATH}")
    assert opened == [printed]
    server.serve(run_dir, port=0, open_browser=False, wait=lambda: None)
    assert len(opened) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_address_of_another_machine_is_refused(run_dir: Path) -> None:
    with pytest.raises(OSError, match=r"could not listen on 203\.0\.113\.1:6006: is that an address of this machine"):
        server.launch(run_dir, host="203.0.113.1")  # reserved for documentation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", ["0.0.0.0", "::1"])
def test_the_printed_address_is_one_that_a_browser_opens(run_dir: Path, host: str) -> None:
    if host == "::1":
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind((host, 0))
            host = "[::1]"
        if host == "::1":
            pytest.skip("this machine has no IPv6 loopback")
    address = server.launch(run_dir, port=0, host=host.strip("[]"))
    assert "0.0.0.0" not in address
    assert (host in address) == (host == "[::1]")
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.status == 200


def test_the_command_states_the_verdict_above_the_address(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "serve", lambda run, **_: print(run))
    with pytest.raises(SystemExit):
        main(["board", str(run_dir)])
    shown = capsys.readouterr()
    assert shown.out.strip() == str(run_dir)
    assert "keep step" in shown.err
    assert shown.err.strip()[-1] == "."


def test_a_directory_without_event_files_is_refused_with_its_content(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no TensorBoard event files under .*found: nothing"):
        server.launch(tmp_path)
    (tmp_path / "weights.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"found: weights.ckpt"):
        server.launch(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        server.launch(tmp_path / "weights.ckpt")

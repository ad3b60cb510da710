"""Replaces `fmtrain fit` in the tests of the sweep's driver, and writes measurements.jsonl as the monitor does.

python fake_trial.py OUT fmtrain fit --config SECONDS --x X ...: RankMe rises to 100·(1 − (x − 0.7)²); x = 0.7 is the
best. Below x = 0 the process crashes; with a last argument "nan", it diverges. With "killed", the first attempt kills
itself at step 30, after it saved. SIGTERM ends it as it ends `fmtrain fit`, with a checkpoint and exit code 130.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(out: Path, arguments: list[str], steps: int = 5) -> None:
    x = float(arguments[arguments.index("--x") + 1])
    seconds = float(arguments[arguments.index("--config") + 1])
    last = out / "checkpoints" / "last.ckpt"
    resume = "--resume" in arguments
    assert resume or not out.exists(), "fmtrain fit refuses a folder that is not empty"
    out.mkdir(parents=True, exist_ok=True)
    step = int(last.read_text()) if last.is_file() else 0

    def save() -> None:
        last.parent.mkdir(exist_ok=True)
        last.write_text(str(step))

    def stop(number: int, frame: object) -> None:
        save()
        print(f"stopped by {signal.Signals(number).name}")
        sys.exit(130)

    signal.signal(signal.SIGTERM, stop)
    diverges = x < 0 and arguments[-1] == "nan"
    if x < 0 and not diverges:
        print("no such file, or the like")
        sys.exit(1)
    while step <= 10 * steps:
        share = step / (10 * steps)
        measured = {"rankme": {"value": 1 + share * 100 * (1 - (x - 0.7) ** 2), "standard_error": 0.5}}
        if diverges:
            measured["rankme"]["value"] = 1.0 if step < 20 else None
        measured["odcorr"] = {"value": 0.5 - 0.1 * share * x, "standard_error": None}
        line = {"step": step, "loss": 6.0 - share, "alarms": [], "measurements": measured}
        with (out / "measurements.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"step {step}", flush=True)
        if step == 30 and arguments[-1] == "killed" and not resume:
            save()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds / steps)
        step += 10
    step -= 10
    save()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""A Hydra multirun whose runs `repmetrics select` ranks afterwards.

python docs/examples/hydra_sweep.py --multirun lr=0.01,0.1,1.0
repmetrics select multirun/
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from sweep_script import main as train

ConfigStore.instance().store(name="config", node={"lr": 0.1, "seed": 0})


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(config: DictConfig) -> None:
    out = Path(HydraConfig.get().runtime.output_dir)  # one folder per run, with its settings in .hydra/
    train(out, lr=config.lr, seed=config.seed)


if __name__ == "__main__":
    main()

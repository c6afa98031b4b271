"""The embedded demo to its end: trained, compared before and after, and let through the gate."""

from __future__ import annotations

from pathlib import Path

from eval.answers import FOLDER
from eval.compare import compare
from eval.gate import gate
from eval.options import CompareOptions, GateOptions, VerdictOptions
from qlora_dpo.config.labeling import EndpointOptions
from qlora_dpo.config.training import TrainConfig
from qlora_dpo.demo.run import demo_config, output_dir, run_demo
from qlora_dpo.errors import UsageError

RULES = Path(__file__).parent / "rules" / "demo.yaml"


def demo(config: TrainConfig) -> None:
    """Train, compare with the model that is in memory then, and print which promises the numbers keep.

    Raises:
        UsageError: a model or data is named, so it is not the demo.
        NotGoodEnough: a rule does not hold.
    """
    if not config.is_demo:
        raise UsageError("demo has its own model and pairs. To train others: python -m qlora_dpo train.")
    trained = run_demo(config)
    folder = output_dir(demo_config(config))
    options = CompareOptions(
        adapter=str(folder),
        prompts=str(folder / "pairs" / "held_out.jsonl"),
        use_cpu=config.model.use_cpu,
        max_new_tokens=demo_config(config).training.max_new_tokens,
        batch_size=128,
    )
    print()
    compare(options, VerdictOptions(), EndpointOptions(), model=None if trained is None else trained.model)
    print()
    gate(GateOptions(folder / FOLDER, RULES))

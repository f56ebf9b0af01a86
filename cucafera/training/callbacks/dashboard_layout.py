"""The layout of TensorBoard's tab Custom Scalars: the few charts that matter, side by side."""

import lightning.pytorch as pl

from cucafera.training.callbacks.base import Callback
from cucafera.training.events import event_logger
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel

CHARTS: dict[str, dict[str, list[str]]] = {
    "Learning": {
        "Loss, nats per token: training, validation, reference": ["loss/train", "loss/val", "loss/original"],
        "Validation, bits per byte": ["bpb/val"],
        "Validation, bits per byte, against tokens": ["bpb/val_by_tokens"],
        "Learning rate": ["train/lr/.*"],
        "Gradient norm before clipping": ["train/gradient_norm"],
    },
    "Speed": {
        "Tokens per second": ["speed/tokens_per_second"],
        "Share of the time spent waiting for data": ["speed/data_wait"],
        "Peak memory, GiB": ["memory/peak_gib"],
    },
    "Layers": {
        "Gradient norm of each layer": ["per_layer/gradient_norm/.*"],
        "Root mean square after each layer": ["per_layer/activation_rms/.*"],
    },
}
"""Categories, charts, and the regular expressions of the curves in them.

They are the same for every run: TensorBoard merges the layouts of all runs, and shows a chart that differs twice.
"""
MFU = {"MFU, against the dense bf16 peak": ["speed/mfu"]}
"""Only for devices whose peak is known, to avoid an empty chart."""
ANSWERS = {
    "Share of the sample answers that end by themselves": ["samples/stopped"],
    "Share of the sample answers with a repeated 5-gram": ["samples/repeated_5gram"],
    "Tokens per sample answer": ["samples/tokens"],
}
"""Only for models that answer."""


class DashboardLayout(Callback):
    """Write the layout of the tab Custom Scalars at the start of a session; emits no curve."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Write the layout."""
        if logger := event_logger(trainer):
            objective = module.objective
            charts = {**CHARTS, "Speed": CHARTS["Speed"] | (MFU if self.hardware.peak_flops is not None else {})}
            if objective.chats:
                charts["Answers"] = ANSWERS
            if objective.charts:
                charts[objective.stage.capitalize()] = dict(objective.charts)
            logger.experiment.add_custom_scalars(
                {
                    category: {title: ["Multiline", [f"{tag}$" for tag in tags]] for title, tags in of_category.items()}
                    for category, of_category in charts.items()
                }
            )

"""What TensorBoard's tab Custom Scalars shows: the few charts that matter, side by side."""

import lightning.pytorch as pl

from cucafera.training.events import event_logger
from cucafera.training.hardware import Hardware

CHARTS: dict[str, dict[str, list[str]]] = {
    "Learning": {
        "Loss, nats a token: training, validation, reference": ["train/loss", "val/loss", "original/train_loss"],
        "Validation, bits a byte": ["val/bpb"],
        "Validation, bits a byte, against tokens": ["by_tokens/val_bpb"],
        "Learning rate: planned, done": ["schedule/planned", "train/lr/.*"],
        "Gradient norm before clipping": ["train/gradient_norm"],
    },
    "Speed": {
        "Tokens a second": ["speed/tokens_per_second"],
        "Share of the time waiting for data": ["speed/data_wait"],
        "Most memory in use, GiB": ["memory/peak_gib"],
    },
    "Layers": {
        "Gradient norm of each layer": ["layers/gradient_norm/.*"],
        "Root mean square behind each layer": ["layers/activation_rms/.*"],
    },
}
"""Categories, charts, and the regular expressions of the curves in them.

They are the same for every run: TensorBoard joins the layouts of all runs, and draws a chart that differs once more.
"""
MFU = {"MFU, against the dense bf16 peak": ["speed/mfu"]}
"""Only for devices whose peak is known: there is no empty chart."""


class Layout(pl.Callback):
    """Writes the layout of the tab Custom Scalars when training begins; it emits no curve."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the layout."""
        if logger := event_logger(trainer):
            charts = {**CHARTS, "Speed": CHARTS["Speed"] | (MFU if self.hardware.peak_flops is not None else {})}
            logger.experiment.add_custom_scalars(
                {
                    category: {title: ["Multiline", [f"{tag}$" for tag in tags]] for title, tags in of_category.items()}
                    for category, of_category in charts.items()
                }
            )

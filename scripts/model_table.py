"""Print the README's table of model presets, computed from conf/model.

python scripts/model_table.py
"""

from cucafera.config.choices import config_directory
from cucafera.config.command_line import composed_config
from cucafera.model.flops import parameter_count, training_flops_per_token


def model_table() -> str:
    """Return a Markdown table with one row per preset, smallest first."""
    presets = [path.stem for path in (config_directory() / "model").glob("*.yaml") if path.stem != "inherited"]
    configs = {
        preset: composed_config([f"model={preset}", "batch_tokens=524_288", "budget_tokens=1e9"]) for preset in presets
    }
    rows = [
        "| model | parameters | layers x hidden | query / key-value heads | vocabulary | context "
        "| GFLOP per token, full / causal |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for preset, config in sorted(configs.items(), key=lambda item: parameter_count(item[1].model)):
        model, length = config.model, config.sequence_length
        full = training_flops_per_token(model, length) / 1e9
        causal = training_flops_per_token(model, length, causal_half=True) / 1e9
        rows.append(
            f"| `{preset}` | {parameter_count(model):,} | {model.num_hidden_layers} x {model.hidden_size} "
            f"| {model.num_attention_heads} / {model.num_key_value_heads} | {model.vocab_size:,} "
            f"| {model.max_position_embeddings:,} | {full:.3g} / {causal:.3g} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(model_table())

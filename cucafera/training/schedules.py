"""Learning-rate schedules as pure functions of the step, so that a resumed run needs only the step."""

import math

from cucafera.config.schema import ScheduleConfig


def lr_ratio(step: int, schedule: ScheduleConfig, horizon_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Args:
        step: The step about to be taken, from 0.
        schedule: Name, warm-up and decay.
        horizon_steps: Step at which the schedule ends; later steps keep the final ratio.

    Returns:
        A fraction in [0, 1]: linear warm-up that reaches the peak at step `warmup_steps`, then
        linear: a line down to `final_lr_ratio` at the horizon (Bergsma et al., 2025, Straight to Zero);
        cosine: half a cosine down to `final_lr_ratio` at the horizon (Loshchilov & Hutter, 2016, without restarts);
        wsd: the peak, then linear decay to `final_lr_ratio` over the last `decay_fraction` (Hu et al., 2024, MiniCPM);
        constant: the peak.
        A cooldown leaves this where it begins, for a line from there to 0 (Hu et al., 2024; Hägele et al., 2024). It
        is computed as the decay of wsd, so that the same decay gives the same rates bit for bit.
    """
    start, steps = schedule.cooldown_start_step, schedule.cooldown_steps
    if start is None or not isinstance(steps, int) or step <= start:
        return _ratio_before_cooldown(step, schedule, horizon_steps)
    done = 1.0 - (start + steps - step) / steps
    return _ratio_before_cooldown(start, schedule, horizon_steps) * (1.0 - min(done, 1.0))


def _ratio_before_cooldown(step: int, schedule: ScheduleConfig, horizon_steps: int) -> float:
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        decay_steps = min(round(schedule.decay_fraction * horizon_steps), horizon_steps - schedule.warmup_steps)
        done = 1.0 - (horizon_steps - step) / decay_steps if decay_steps else 0.0
        return 1.0 - (1.0 - schedule.final_lr_ratio) * min(max(done, 0.0), 1.0)
    decay_steps = horizon_steps - schedule.warmup_steps
    done = min((step - schedule.warmup_steps) / decay_steps, 1.0) if decay_steps else 1.0
    left = 1.0 - done if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final_lr_ratio + (1.0 - schedule.final_lr_ratio) * left

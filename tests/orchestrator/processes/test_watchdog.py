"""Silence is what somebody who looked has not heard."""

from mgpu.orchestrator.processes.gateway_process import ASK_INTERVAL_S, LONGEST_GAP_S, Watchdog


def test_it_asks_once_a_second_and_adds_up_the_silence() -> None:
    now = [100.0]
    watchdog = Watchdog(clock_s=lambda: now[0])
    asked = 0
    for _ in range(40):
        now[0] += ASK_INTERVAL_S / 4
        asked += watchdog.check()
    assert asked == 10
    assert watchdog.silent_s == 10 * ASK_INTERVAL_S
    watchdog.heard()
    assert watchdog.silent_s == 0.0


def test_time_in_which_nobody_looked_is_not_held_against_the_other() -> None:
    now = [100.0]
    watchdog = Watchdog(clock_s=lambda: now[0])
    now[0] += 3600.0  # stopped in a terminal, say
    assert watchdog.check()
    assert watchdog.silent_s == LONGEST_GAP_S

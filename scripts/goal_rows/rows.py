"""What measures each row of the goals table: tests, scripts, or a measurement of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from functools import cache, partial, reduce
from itertools import product
from operator import add
from typing import Any

from scripts.goal_rows.measuring import Bench, Cases, Measured

KILLS = 500
GRADIENTS = "the_gradient_is_that_of_one_process"


def of_cases(cases: Cases, words: str = "", holds: bool = True) -> Measured:
    """A row that counts tests."""
    return Measured(f"{cases}{words}", cases.good and holds, cases.seconds)


def resume(bench: Bench) -> Measured:
    """Row 1: every kind of trainer, stopped at a boundary and between, on one to four processes; and shards."""
    from scripts.goal_rows import resumes
    from tests.jobs import JOBS

    equal, apart, seconds = 0, list[str](), 0.0
    kinds = [*JOBS][: bench.count(len(JOBS), 2)]
    for kind, world in product(kinds, resumes.WORLDS[: bench.count(4, 2)]):
        name = f"resume/{kind}-{world}"
        whole = bench.kept(name, partial(resumes.unbroken, kind, world))
        seconds += whole["seconds"]
        for moment in ("boundary", "between"):
            work = partial(resumes.resumed, kind, world, moment, whole["digest"])
            found = bench.kept(f"{name}-{moment}", work)
            seconds += found["seconds"]
            equal += found["equal"]
            apart += [] if found["equal"] else [f"{kind} on {world} at {moment}: {', '.join(found['differs'][:2])}"]
    shards = bench.tests("tests/test_sharding.py", "goes_on_to_the_same_bits|a_stop_anywhere_in_shards")
    if not bench.quick:
        seconds += bench.kept("resume/four-shards", resumes.resumed_in_four_shards)["seconds"]
    signals = bench.tests("tests/test_stops.py")
    told = f"{equal} of {equal + len(apart)} stops of {len(kinds)} kinds equal; FSDP2, HSDP {shards}; signals {signals}"
    told += f"; APART: {'; '.join(apart[:3])}" if apart else ""
    return Measured(told, not apart and shards.good and signals.good, seconds + shards.seconds + signals.seconds)


def keys(bench: Bench) -> Measured:
    """Row 2: each field of the record, left out."""
    from scripts.goal_rows import resumes
    from trainers.state import State

    names = [one.name for one in fields(State)]
    left = bench.tests("tests/test_resume.py", "no_field_of_the_record_can_be_left_out")
    apart = bench.tests("tests/test_resume.py", "the_clock_goes_on|steps_skipped_in_a_row|the_loss_scale_is_kept")
    found = {name: bench.kept(f"left-out-{name}", partial(resumes.left_out, name)) for name in resumes.FIELDS}
    bad = [name for name, one in found.items() if not one["differs"]]
    count = left.passed + len(found) - len(bad) + (4 if apart.good else 0)  # seconds and clock, scaler, skipped
    seconds = left.seconds + apart.seconds + sum(one["seconds"] for one in found.values())
    told = f"{count} of {len(names)} fields" + (f"; changes nothing: {', '.join(bad)}" if bad else "")
    return Measured(told, left.good and apart.good and count == len(names), seconds)


def other_worlds(bench: Bench) -> Measured:
    """Row 3."""
    cases = bench.tests("tests/test_stops.py", "another_number_of_processes")
    cases += bench.tests("tests/test_sharding.py", "a_run_goes_on_with_other_shards")
    cases += bench.tests("tests/test_processes.py", "the_first_rollout_is_bit_equal")
    return of_cases(cases, " within 1e-6, rollouts bit-equal")


def kills(bench: Bench) -> Measured:
    """Row 4: chains of kills, each chain kept."""
    from scripts.goal_rows import kills

    wanted, number, seconds = bench.count(KILLS, 8), 0, 0.0
    held, places, unreadable, differs, lost = 0, dict[str, int](), 0, 0, 0

    @cache
    def unbroken(kind: str, world: int) -> dict[str, str]:
        work = partial(kills.unbroken_run, kind, world)
        told: dict[str, str] = bench.kept(f"kills/{kind}-{world}", lambda: {"digest": work()})["digest"]
        return told

    while held < wanted:
        one = bench.kept(f"kills/chain-{number:03d}", partial(kills.chain, number, unbroken))
        number += 1
        held += len(one["kills"])
        for place in one["kills"]:
            places[place] = places.get(place, 0) + 1
        unreadable += len(one["unreadable"])
        differs += bool(one["differs"])
        lost, seconds = max(lost, one["most lost"]), seconds + one["seconds"]
    told = f"{held} kills of {number} runs ({counted(places)}): {unreadable} unreadable, {differs} of {number} runs "
    told += f"differ in the end, at most {lost} optimizer step lost (the interval)"
    return Measured(told, not unreadable and not differs and lost <= 1, seconds)


def counted(places: Mapping[str, int]) -> str:
    """Most first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(places.items(), key=lambda one: -one[1]))


def corrupted(bench: Bench) -> Measured:
    """Row 5."""
    named = bench.tests("tests/test_checkpoint.py", "a_damaged_one_is_named")
    back = bench.tests("tests/test_checkpoint.py", "falls_back_and_says_so|none_of_whose_checkpoints|newer_format")
    return Measured(
        f"{named.passed} corruptions named, all fall back; whole runs {back}",
        named.good and named.passed >= 12 and back.good,
        named.seconds + back.seconds,
    )


def pause(bench: Bench) -> Measured:
    """Row 6."""
    from scripts.goal_rows import own

    found = bench.kept("pause", lambda: own.save_pause(bench.count(9, 3)))
    told = f"{found['median']:.2f} s, median of {found['times']} (slowest {found['slowest']:.2f} s)"
    return Measured(told, found["median"] <= 0.5, found["seconds"])


def signals(bench: Bench) -> Measured:
    """Row 7."""
    from scripts.goal_rows import own

    found = bench.kept("stops", lambda: own.stops(bench.count(20, 3)))
    trials = found["trials"]
    good = [one for one in trials if one["same step"] and one["steps"] <= 1]
    steps, wait = max((one["steps"] for one in good), default=0), max((one["wait"] for one in good), default=0.0)
    told = (
        f"{len(good)} of {len(trials)} stopped at one step on all processes, {steps} step later at most, {wait:.2f} s"
    )
    return Measured(told, len(good) == len(trials), found["seconds"])


def death(bench: Bench) -> Measured:
    """Row 8."""
    from scripts.goal_rows import own

    seen = bench.kept("detection", own.detection)
    cases = bench.tests("tests/test_kills.py", "one_of_two_processes_is_killed")
    cases += bench.tests("tests/test_faults.py", "a_process_that_hangs_is_named|a_process_that_is_killed_is_named")
    told = f"{cases}; seen after {seen['wait']:.2f} s"
    return Measured(told, cases.good and seen["wait"] <= 2, cases.seconds + seen["seconds"])


def gradients(bench: Bench) -> Measured:
    """Row 9."""
    cases = bench.tests("tests/test_sharding.py", GRADIENTS)
    cases += bench.tests("tests/test_processes.py", "gradient|noising_anew_is|accumulation")
    return of_cases(cases, " within 1e-6")


def online(bench: Bench) -> Measured:
    """Row 10."""
    from scripts.goal_rows import own

    found = bench.kept("worlds", lambda: own.worlds(bench.count(5, 2)))
    cases = bench.tests("tests/test_processes.py", "come_to_the_same_policy|first_rollout|gains_are_the_same")
    most = max(found["gaps"].values())
    told = f"{most:.1e} at most, of {', '.join(found['gaps'])} processes; {cases}"
    return Measured(told, most <= 1e-6 and cases.good, found["seconds"] + cases.seconds)


def first_ratio(bench: Bench) -> Measured:
    """Row 11."""
    from scripts.goal_rows import own

    found = {one: bench.kept(f"ratio-{one}", partial(own.ratios, one)) for one in ("no", "bf16")}
    same = max(one["same"] + one["first step"] for one in found.values())
    clipped = max(one["clipped"] for one in found.values())
    cases = bench.tests("tests/test_conformance.py", "first_ratio|ratios_do_not_depend")
    cases += bench.tests("tests/test_ratio_guard.py")
    fp32, bf16 = found["no"], found["bf16"]
    told = f"{same:g} from 1 in the update's own calls (fp32, bf16 autocast), {100 * clipped:g} % clipped; single rows "
    told += f"fp32 {fp32['other']:.1e}, of the last step {fp32['last']:.1e} (the last bit of its log-prob: "
    told += f"{fp32['unit']:.1e}), bf16 {max(bf16['other'], bf16['last']):.1e}; {cases}"
    seconds = cases.seconds + sum(one["seconds"] for one in found.values())
    near = fp32["other"] <= 2.4e-7 and fp32["last"] <= max(2.4e-7, 2.02 * fp32["unit"])
    return Measured(told, same == 0 and clipped == 0 and near and cases.good, seconds)


def sampler(bench: Bench) -> Measured:
    """Row 12."""
    from scripts.goal_rows.sampler import cases_of

    found = bench.kept("sampler", lambda: cases_of(bench.count(20_000, 400)))
    told = f"{found['cases']} cases, {len(found['wrong'])} wrong, {found['spent']:.1f} s"
    return Measured(told, not found["wrong"] and found["spent"] <= 5, found["seconds"])


def context_parallel(bench: Bench) -> Measured:
    """Row 13."""
    return of_cases(bench.tests("tests/test_context_parallel.py"), " within 1e-6")


def faults(bench: Bench) -> Measured:
    """Row 14."""
    files = {
        "test_faults": "", "test_bad_input": "", "test_reward_remote": "test_faults|is_down|redirect|refused",
        "test_prompts": "bad|refused|empty", "test_preferences": "bad|refused|broken|not_there|named",
        "test_checkpoint": "full_disk|fails|damaged", "test_overlap": "fails|stops_all",
        "test_reward_process": "raises|dies",
    }  # fmt: skip
    cases = reduce(add, (bench.tests(f"tests/{name}.py", pattern) for name, pattern in files.items()))
    return of_cases(cases, f", the slowest {cases.slowest:.1f} s", cases.passed >= 45)


def pickles(bench: Bench) -> Measured:
    """Row 15."""
    cases = bench.tests("tests/test_security.py", "hostile|pickle|nothing_runs|dangers|python_in_it")
    cases += bench.tests("tests/test_checkpoint.py", "nothing_is_pickled")
    cases += bench.tests("tests/test_imports.py")
    return of_cases(cases)


def server(bench: Bench) -> Measured:
    """Row 16."""
    cases = bench.tests("tests/test_reward_server.py")
    return of_cases(cases, ", of which one sends 10,000 mutated bodies")


def fuzz(bench: Bench) -> Measured:
    """Row 17."""
    count = bench.count(20_000, 1000)
    found = bench.script("fuzz", ["-m", "scripts.fuzz", "--count", str(count), "--out", str(bench.out / "fuzz")])
    told = f"{found['said'][-1]}, {found['seconds']:.0f} s"
    return Measured(told, found["code"] == 0 and found["seconds"] <= 60, found["seconds"])


def configs(bench: Bench) -> Measured:
    """Row 18."""
    cases = bench.tests("tests/test_config.py", "refused|named|bad_|unsafe|missing")
    cases += bench.tests("tests/test_bad_input.py", "a_bad_config|bad_prompt_file|not_there")
    return of_cases(cases, "", cases.passed >= 60)


def multi_process(bench: Bench) -> Measured:
    """Row 19. The time is that of one repeat by itself: the others may have been made several at once, each slower."""
    alone, first = repeated(bench, "alone", 1)
    many, made = repeated(bench, "repeats", bench.count(200, 2))
    passed, seconds = re.search(r"(\d+) passed", first[-1]["line"]), first[-1]["seconds"]
    tests = int(passed[1]) if passed else 0
    failed = sum(not one["passed"] for one in made)
    told = f"{tests} in {seconds:.0f} s by themselves; {failed} of {len(made)} repeats with a failure"
    good = alone["code"] == many["code"] == 0 and tests >= 60 and seconds <= 90
    return Measured(told, good, alone["seconds"] + many["seconds"])


def repeated(bench: Bench, name: str, times: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How repeat_tests.py ended, and the repeats that it has counted; it goes on with those that it has."""
    folder = bench.out / name
    if bench.again:
        (folder / "repeats.jsonl").unlink(missing_ok=True)
    done = bench.script(name, ["scripts/repeat_tests.py", "--times", str(times), "--out", str(folder)])
    return done, [json.loads(line) for line in (folder / "repeats.jsonl").read_text().splitlines()]


def soak(bench: Bench) -> Measured:
    """Row 20."""
    folder, epochs = bench.out / "soak", bench.count(2000, 60)
    if not (bench.out / "soak.json").exists() or bench.again:
        shutil.rmtree(folder, ignore_errors=True)  # it must be new; what a broken measurement has left goes
    found = bench.script("soak", ["scripts/soak.py", "--out", str(folder), "--epochs", str(epochs)])
    return Measured("; ".join(found["said"]), found["code"] == 0, found["seconds"])


def golden(bench: Bench) -> Measured:
    """Row 21."""
    from scripts.goal_rows import resumes
    from tests.jobs import JOBS

    cases = bench.tests("tests/test_recorded_runs.py")
    for name in ("test_transitions", "test_objectives", "test_advantages", "test_nft", "test_flow_dpo"):
        cases += bench.tests(f"tests/{name}.py")
    kinds = [*JOBS][: bench.count(len(JOBS), 2)]
    runs = [bench.kept(f"resume/{kind}-1", partial(resumes.unbroken, kind, 1)) for kind in kinds]
    same = sum(one["repeats"] for one in runs)
    told = f"{same} of {len(kinds)} kinds of run repeat to the last bit; recorded numbers of the authors' code {cases}"
    return Measured(told, same == len(kinds) and cases.good, cases.seconds + sum(one["seconds"] for one in runs))

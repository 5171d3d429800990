"""What a batch will take, against batches that were measured and schedules done by hand."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from mtprune_utils import events
from mtprune_utils.files import PROJECT, csv_text, read_table
from mtprune_utils.run import cluster, plan
from mtprune_utils.run.plan import BATCH_START, BETWEEN_JOBS, Job
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.phases import steps
from mtprune_utils.study.profiles import get_profile

QUICK = PROJECT / "figures/quick/timings.csv"


def quick(**overrides):
    return Experiment(get_profile("quick", overrides))


def timed(experiment, place, rows):
    """Leave these rows where a batch of the experiment leaves its timings."""
    (place / experiment.label).mkdir()
    (place / experiment.label / "timings.csv").write_text(csv_text(rows))


def measured(experiment):
    """The jobs of the measured batch of `quick`, with the seconds that each took."""
    seconds = {row["job"]: float(row["seconds"]) for row in read_table(QUICK)}
    jobs = plan.jobs_of(experiment, plan.Seconds(experiment))
    return [replace(job, seconds=seconds[job.name]) for job in jobs]


def test_the_hours_of_a_measured_batch_are_told_from_one_seed_within_a_quarter(tmp_path):
    """From what the first seed took, all of it: work, and wall time on two workers."""
    experiment = quick()
    rows = [row for row in read_table(QUICK) if " seed 0 " in f"{row['job']} "]
    timed(experiment, tmp_path, rows)
    told = plan.jobs_of(experiment, plan.Seconds(experiment, tmp_path))
    was = measured(experiment)
    assert len(rows) < len(was) - 10 and [job.name for job in told] == [job.name for job in was]
    for one, other in zip(told, was):
        if not one.name.startswith("figure"):
            assert one.seconds == pytest.approx(other.seconds, rel=0.25), one.name
    assert sum(j.seconds for j in told) == pytest.approx(sum(j.seconds for j in was), rel=0.05)
    assert plan.makespan(told, 2) == pytest.approx(plan.makespan(was, 2), rel=0.05)


def test_a_run_of_twice_the_steps_takes_twice_as_long_but_for_its_start():
    def seconds(**overrides):
        experiment = quick(**overrides)
        return plan.Seconds(experiment)(experiment.dense(0)) - plan.STARTUP

    assert seconds(**{"dense.steps": 2600}) == pytest.approx(2 * seconds())
    assert seconds(batch_size=16) == pytest.approx(2 * seconds())


def test_a_batch_of_other_numbers_tells_nothing_of_this_one(tmp_path):
    """As `quick-custom` may be of any overrides: what `quick` took is scaled instead."""
    experiment = quick(batch_size=16)
    timed(experiment, tmp_path, [{**row, "seconds": 1e4} for row in read_table(QUICK)])
    run = experiment.dense(0)
    assert plan.Seconds(experiment, tmp_path)(run) == plan.Seconds(experiment)(run)


def test_figures_alone_measure_nothing(tmp_path):
    experiment = quick()
    timed(experiment, tmp_path, [row for row in read_table(QUICK) if row["stage"] == "figure"])
    assert plan.Seconds(experiment, tmp_path).file == QUICK


def test_a_run_that_is_tuned_for_a_size_ends_there():
    """As long as those of the committed `study` are, to a quarter: criteria differ."""
    experiment = Experiment(get_profile("study"))
    rows = read_table(PROJECT / "figures/study/results/prune_evaluations.csv")
    took = {}
    for row in rows:
        took[row["run"]] = max(took.get(row["run"], 0), int(row["step"]))
    for level in range(len(experiment.profile.sizes)):
        ends = {n for run, n in took.items() if f"taylor-seed0-level{level}-iterative" in run}
        expected = steps(experiment.prune("taylor", 0, level))
        assert [expected] == pytest.approx([*ends], rel=0.25)


def test_a_schedule_done_by_hand():
    """A long job behind a short one; what has priority goes first."""
    jobs = [
        Job("a", 10),
        Job("b", 5, priority=1),
        Job("c", 20, (1,), priority=1),
        Job("d", 1, (0, 2)),
    ]
    gap = BETWEEN_JOBS
    assert plan.makespan(jobs, 1) == BATCH_START + 36 + 4 * gap
    assert plan.makespan(jobs, 2) == BATCH_START + 26 + 3 * gap
    assert [job.name for job in plan.longest_chain(jobs)] == ["b", "c", "d"]


def test_what_runs_alone_waits_until_nothing_else_does():
    jobs = [Job("alone", 5, alone=True), Job("a", 10), Job("b", 5), Job("c", 1, (0,))]
    assert plan.makespan(jobs, 2, plan.Driver(0, 0)) == 10 + 5 + 1
    assert next(job for job in measured(quick()) if job.alone).name == "figure fig4_speedup"


def test_a_driver_starts_one_job_after_another_and_saturates():
    """However many the workers: 1,000 jobs at two a second, each of which takes 20 s."""
    driver = plan.Driver(begin=30, each=4, submit=0.5)
    walls = [plan.makespan([Job("", 20)] * 1000, n, driver) for n in (1, 60, 1000)]
    assert walls[0] == pytest.approx(30 + 1000 * 24.5)
    assert walls[1:] == pytest.approx([30 + 500 + 24] * 2)


def test_what_a_clusters_driver_takes_is_what_was_measured():
    for row in read_table(plan.DRIVER):
        driver = plan.Driver.of_cluster(int(row["runs"]))
        assert driver.begin == pytest.approx(float(row["graph_seconds"]))
        assert driver.each == pytest.approx(2 * float(row["read_seconds"]))
        assert driver.submit * int(row["jobs"]) == pytest.approx(float(row["drive_seconds"]))
    small, large = (plan.Driver.of_cluster(runs) for runs in (300, 5000))
    assert small.begin < large.begin and small.each < large.each and large.submit > 0


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_wall_time_lies_between_the_bounds_of_any_list_schedule(workers):
    """Graham, 1969: at least the work by the workers and the chain, at most their sum."""
    jobs = [replace(j, seconds=j.seconds + BETWEEN_JOBS, alone=False) for j in measured(quick())]
    work = sum(job.seconds for job in jobs) / workers
    chain = sum(job.seconds for job in plan.longest_chain(jobs))
    wall = plan.makespan([replace(j, seconds=j.seconds - BETWEEN_JOBS) for j in jobs], workers)
    assert max(work, chain) <= wall - BATCH_START + 1e-6
    assert wall - BATCH_START <= work + chain + 1e-6


def test_a_seed_is_finished_before_the_next_but_dense_networks_are_a_seed_ahead():
    of = {run.stage + str(run.seed): plan.priority(run) for run in quick().runs()}
    order = ["dense0", "dense1", "prune0", "retrain0", "dense2", "prune1", "retrain1"]
    assert sorted(order, key=of.get, reverse=True) == order


def test_a_time_limit_leaves_room_and_is_long_where_nothing_is_known():
    def limit(profile, seconds):
        experiment = Experiment(get_profile(profile))
        known = plan.Seconds(experiment)
        run = experiment.dense(0)
        work = plan.steps(run) * plan._step_macs(experiment)
        known.rates = {(): (seconds - plan.STARTUP) / work}
        return plan.time_limit(known, run)

    assert limit("quick", 10) == plan.LEAST_MINUTES
    assert limit("quick", 3599) == 180
    assert limit("paper", 3600) == plan.UNKNOWN_MINUTES, "what quick took is no measure of it"


def test_short_jobs_go_together_until_starting_them_costs_little():
    sizes = cluster.group_sizes({"dense": 3000, "retrain": 60, "figure": 10, "score": 0.0})
    assert sizes == {"retrain": 10, "figure": 60, "score": cluster.GROUP_SECONDS}


def test_the_command_says_what_there_is_to_know_and_refuses_in_one_line():
    command = [sys.executable, "-m", "mtprune_utils.run.cli", "plan"]
    options = ["--profile", "quick", "--workers", "2", "--overrides", json.dumps({"seeds": 12})]
    said = subprocess.run([*command, *options], cwd=PROJECT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for words in (
        "quick-custom: 101 jobs",
        "figures/quick/timings.csv",
        "longest chain",
        "CPU-hours",
        "GB",
        "first is the",
    ):
        assert words in said.stdout
    wrong = subprocess.run([*command, "--profile", "quik"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1


def test_a_large_grid_is_stopped_first_by_being_read():
    said = plan.report(quick(seeds=1429, **{"tuning.seed": 10**6, "controls.seeds": 0}))
    assert "10008 jobs" in said and "first is reading the grid" in said
    assert "first is the longest chain" in plan.report(quick())


# --- what a cluster's jobs tell ---


def test_events_come_in_their_order_each_once_between_the_other_lines(tmp_path, monkeypatch):
    monkeypatch.setenv(events.FOLDER, str(tmp_path))
    for line in "abc":
        events.put(f"{line}\n")
    lines = list(cluster.with_events(iter(["snakemake\n"]), tmp_path))
    assert lines == ["snakemake\n", "a\n", "b\n", "c\n"]
    assert not list(cluster.take_events(tmp_path))


def test_events_come_though_snakemake_talks_without_a_pause(tmp_path, monkeypatch):
    monkeypatch.setenv(events.FOLDER, str(tmp_path))
    monkeypatch.setattr(cluster, "POLL", 0.05)
    events.put("event\n")

    def talk():
        for _ in range(100):
            time.sleep(0.01)
            yield "snakemake\n"

    lines = list(cluster.with_events(talk(), tmp_path))
    assert 0 < lines.index("event\n") < 50

# The batch as a graph: dense(seed) -> prune(criterion, seed) -> retrain(criterion, seed, level) ->
# figures, with the control arms beside them and, where a profile tunes, a search before each prune
# and retrain. Each job executes one notebook. Usually started by `make figures`; by hand, or on a
# cluster:
#     snakemake --cores 2 --rerun-triggers input --config profile=quick
#
# A run folder's name carries a hash of every number that its results depend on, so a changed number
# makes a new run. Whether a finished run is the present code's, and follows from what is here, is
# decided by its marker's content: the launcher takes the markers of others away
# (`launch.reopen_outdated`), a notebook refuses them. So inputs are `ancient`: times decide
# nothing. The executed notebook is no `log:`, because Snakemake deletes logs before a job and
# leaves an empty file where a failed one wrote none.

import json
import shlex
import sys
from pathlib import Path

from mtprune_utils.registry import known
from mtprune_utils.run.launch import tell, visible_gpus
from mtprune_utils.stages import get_stage, stage_names
from mtprune_utils.study import store
from mtprune_utils.study.grid import Experiment

for key in config:
    known(key, ("profile", "runs", "figures", "overrides", "data", "root"), "setting")
SHARED = {
    "profile": config.get("profile", "quick"), "runs": str(config.get("runs", "runs")),
    "overrides": config.get("overrides", {}), "data": config.get("data", "rooms"),
    "root": str(config.get("root") or ""),
}
EXPERIMENT = Experiment.open(**SHARED)
EXPERIMENT.check()
PROFILE = EXPERIMENT.profile
RUNS = {f"{run.stage}/{run.name}": run for run in EXPERIMENT.runs()}
RUNS_FOLDER = f"{SHARED['runs']}/{PROFILE.name}"
FIGURES_FOLDER = str(config.get("figures", "figures"))

# A seed is finished before the next begins, so that a study of many sittings has whole seeds; but
# what others wait for goes first, dense networks a seed ahead, so that no core idles.
PRIORITIES = {"dense": 14, "tune": 3, "prune": 2, "retrain": 1, "score": 1}
ABOUT = {path: store.about_notebook(path) for path in store.notebook_paths()}
# {figure: its notebook}. What else that one draws comes with it, and not in every profile.
FIGURES = {
    about["figures"][0]: path
    for path, about in ABOUT.items() if "figures" in about and EXPERIMENT.draws(about)
}
# Weights are no outputs: a run whose tables alone are here counts as finished. The marker is
# written last.
STAGE_FILES = {stage: (*get_stage(stage).TABLES, store.DONE) for stage in stage_names()}
FIGURE_FILES = [
    f"{FIGURES_FOLDER}/{EXPERIMENT.label}/{{figure}}.{kind}" for kind in store.FIGURE_KINDS
]
# exec: no shell stands between Snakemake and the runner, which ends when Snakemake does.
RUN = (
    "exec {sys.executable:q} -m mtprune_utils.run.launch notebook "
    "{params.notebook:q} {params.executed:q} --expect {output:q} {params.arguments}"
)


def run_files(run):
    return [f"{RUNS_FOLDER}/{run.stage}/{run.name}/{file}" for file in STAGE_FILES[run.stage]]


def cell(run):
    """A run's cell as its notebook's parameters: a search has its profile's seed."""
    named = {name: value for name, value in run.cell.items() if value not in (None, "")}
    if run.stage == "tune":
        del named["seed"]
    return named


def job_name(run):
    plain = ("criterion", "arm")
    named = cell(run).items()
    words = [f"{value}" if name in plain else f"{name} {value}" for name, value in named]
    return " ".join([run.stage, *words])


def arguments(job, parameters):
    """As `launch notebook` takes them: text as it is, the rest as JSON."""
    words = ["--job", job]
    for name, value in parameters.items():
        words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def priority(stage):
    def of(wildcards):
        seed = RUNS[f"{stage}/{wildcards.name}"].seed
        first = -1 if seed == PROFILE.tuning.seed else seed
        # All above a figure's 0: those fill the gaps at the end.
        return PRIORITIES.get(stage, 0) + 10 * (PROFILE.seeds - first)

    return of


def upstream(stage):
    return lambda wildcards: [
        ancient(file)
        for run in RUNS[f"{stage}/{wildcards.name}"].inputs for file in run_files(run)
    ]


def stage_notebook(stage):
    """A function, since Snakemake takes braces in a path for wildcards."""
    return lambda wildcards: str(store.stage_notebook(stage))


def stage_arguments(stage):
    def of(wildcards, output):
        run = RUNS[f"{stage}/{wildcards.name}"]
        return arguments(job_name(run), {**SHARED, **cell(run)})

    return of


def figure_inputs(wildcards):
    needed = EXPERIMENT.needed(ABOUT[FIGURES[wildcards.figure]]["needs"])
    return [ancient(file) for run in needed for file in run_files(run)]


def alone(wildcards):
    return ABOUT[FIGURES[wildcards.figure]].get("alone", False)


def figure_arguments(wildcards, output):
    return arguments(f"figure {wildcards.figure}", {**SHARED, "figures": FIGURES_FOLDER})


tell(
    "batch", "grid",
    jobs=[job_name(run) for run in RUNS.values()] + [f"figure {figure}" for figure in FIGURES],
    figures=[FIGURE_FILES[0].format(figure=figure) for figure in FIGURES],
)


wildcard_constraints:
    name="[^/]+",
    figure="|".join(FIGURES),


rule all:
    input:
        [run_files(run) for run in RUNS.values()],
        expand(FIGURE_FILES, figure=FIGURES),


for stage in stage_names():

    rule:
        name:
            stage
        input:
            upstream(stage),
        output:
            [f"{RUNS_FOLDER}/{stage}/{{name}}/{file}" for file in STAGE_FILES[stage]],
        params:
            notebook=stage_notebook(stage),
            executed=lambda wildcards, output: str(Path(output[0]).with_name("notebook.ipynb")),
            arguments=stage_arguments(stage),
        resources:
            gpu=1 if visible_gpus() and PROFILE.device != "cpu" else 0,
        priority: priority(stage)
        shell:
            RUN


rule figure:
    input:
        figure_inputs,
    output:
        FIGURE_FILES,
    params:
        notebook=lambda wildcards: str(FIGURES[wildcards.figure]),
        executed=lambda wildcards, output: f"{RUNS_FOLDER}/figures/{wildcards.figure}.ipynb",
        arguments=figure_arguments,
    # What is measured is measured while nothing else runs.
    threads: lambda wildcards: workflow.cores if alone(wildcards) else 1
    shell:
        RUN

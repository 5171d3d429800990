# The batch as a graph: dense(seed) -> prune(criterion, seed) -> retrain(criterion, seed, level) ->
# figures, with the control arms beside them and, where a profile tunes, a search before each prune
# and retrain. Each job executes one notebook. Usually started by `make figures`; by hand, or on a
# cluster:
#     snakemake --cores 2 --rerun-triggers input --config profile=quick
# On a cluster each job reads this file again, with the configuration of the launch.
#
# A run folder's name carries a hash of every number that its results depend on, so a changed number
# makes a new run. Whether a finished run is the present code's, and follows from what is here, is
# decided by its marker's content: the launcher takes the markers of others away
# (`launch.reopen_outdated`), a notebook refuses them. So inputs are `ancient`: times decide
# nothing. The executed notebook is no `log:`, because Snakemake deletes logs before a job and
# leaves an empty file where a failed one wrote none.

import json
import os
import shlex
import sys
from pathlib import Path

from mtprune_utils import events
from mtprune_utils.registry import known
from mtprune_utils.run import cluster, plan
from mtprune_utils.run.launch import visible_gpus
from mtprune_utils.stages import get_stage, stage_names
from mtprune_utils.study import phases, store
from mtprune_utils.study.grid import Experiment

for key in config:
    known(key, ("profile", "runs", "figures", "overrides", "data", "root"), "setting")
SHARED = {
    "profile": config.get("profile", "quick"), "runs": str(config.get("runs", "runs")),
    "overrides": config.get("overrides", {}), "data": config.get("data", "rooms"),
    "root": str(config.get("root") or ""),
}
EXPERIMENT = Experiment.open(**SHARED)
if workflow.is_main_process:  # not once more for each job of a cluster: it builds the network
    EXPERIMENT.check()
PROFILE = EXPERIMENT.profile
RUNS = {f"{run.stage}/{run.name}": run for run in EXPERIMENT.runs()}
RUNS_FOLDER = f"{SHARED['runs']}/{PROFILE.name}"
FIGURES_FOLDER = str(config.get("figures", "figures"))

FIGURES = plan.figures(EXPERIMENT)
ON_CLUSTER = events.FOLDER in os.environ
# Weights are no outputs: a run whose tables alone are here counts as finished. The marker is
# written last.
STAGE_FILES = {stage: (*get_stage(stage).TABLES, store.DONE) for stage in stage_names()}
# Where no disk is shared, all else that others read of a run goes by object storage, in one file.
STORED = workflow.storage_settings.default_storage_provider is not None
if STORED:
    STAGE_FILES = {stage: (*files, cluster.PACKED) for stage, files in STAGE_FILES.items()}
FIGURE_FILES = [
    f"{FIGURES_FOLDER}/{EXPERIMENT.label}/{{figure}}.{kind}" for kind in store.FIGURE_KINDS
]
# exec: no shell stands between Snakemake and the runner, which ends when Snakemake does.
RUN = (
    "exec {sys.executable:q} -m mtprune_utils.run.launch notebook "
    "{params.notebook:q} {params.executed:q} --expect {output:q} {params.arguments}"
)
if STORED:
    RUN += " --unpack {input:q} --pack {params.packed:q}"


def run_files(run):
    return [f"{RUNS_FOLDER}/{run.stage}/{run.name}/{file}" for file in STAGE_FILES[run.stage]]


def place_of(file, depth):
    """The folder so many above an output: where Snakemake wants it, which storage puts elsewhere.

    A notebook's relative paths start at the repository.
    """
    place = Path(file).parents[depth]
    return str(place.resolve() if STORED else place)


def arguments(job, parameters):
    """As `launch notebook` takes them: text as it is, the rest as JSON."""
    words = ["--job", job]
    for name, value in parameters.items():
        words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def priority(stage):
    return lambda wildcards: plan.priority(RUNS[f"{stage}/{wildcards.name}"])


def needs(stage):
    """Resources: a GPU where there are some, and of a cluster's job its time limit in minutes.

    (A cluster's profile says whether a job gets a GPU there.)
    """
    if not ON_CLUSTER:
        return {"gpu": 1} if visible_gpus() and PROFILE.device != "cpu" else {}
    seconds = plan.Seconds(EXPERIMENT, Path(FIGURES_FOLDER))

    def minutes(wildcards):
        return plan.time_limit(seconds, RUNS[f"{stage}/{wildcards.name}"])

    return {"runtime": minutes}


def starts_from(run):
    """The runs that one needs: where no disk is shared, also what those need, as notebooks do."""
    further = [other for source in run.inputs for other in starts_from(source)] if STORED else []
    return list({other.folder: other for other in (*run.inputs, *further)}.values())


def upstream(stage):
    return lambda wildcards: [
        ancient(file)
        for run in starts_from(RUNS[f"{stage}/{wildcards.name}"]) for file in run_files(run)
    ]


def stage_notebook(stage):
    """A function, since Snakemake takes braces in a path for wildcards."""
    return lambda wildcards: str(store.stage_notebook(stage))


def stage_arguments(stage):
    def of(wildcards, output):
        run = RUNS[f"{stage}/{wildcards.name}"]
        runs = place_of(output[0], 3)
        return arguments(phases.job_name(run), {**SHARED, **phases.cell(run), "runs": runs})

    return of


def figure_inputs(wildcards):
    needed = EXPERIMENT.needed(store.about_notebook(FIGURES[wildcards.figure])["needs"])
    return [ancient(file) for run in needed for file in run_files(run)]


def alone(wildcards):
    return store.about_notebook(FIGURES[wildcards.figure]).get("alone", False)


def figure_arguments(wildcards, input, output):
    runs, figures = place_of(input[0], 3), place_of(output[0], 1)
    parameters = {**SHARED, "runs": runs, "figures": figures}
    return arguments(f"figure {wildcards.figure}", parameters)


if workflow.is_main_process:
    events.tell(
        "batch", "grid",
        jobs=[*map(phases.job_name, RUNS.values()), *(f"figure {figure}" for figure in FIGURES)],
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
            packed=lambda wildcards, output: [file for file in output if file.endswith(".tar")],
        resources:
            **needs(stage),
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
        packed=[],
    resources:
        **({"runtime": plan.LEAST_MINUTES} if ON_CLUSTER else {}),
    # What is measured is measured while nothing else runs.
    threads: lambda wildcards: workflow.cores if alone(wildcards) else 1
    shell:
        RUN

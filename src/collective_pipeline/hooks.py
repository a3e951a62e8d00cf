"""What happens around a run: checks before it, one MLflow run for each arm, the answer after it, plain errors."""

import contextlib
import errno
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import click
import mlflow
import pandas as pd
import psutil
from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from omegaconf import OmegaConf

from collective_pipeline.config import (
    Arm,
    Parameters,
    UserError,
    check_parameters,
    flatten,
    list_nested,
)
from collective_pipeline.evaluation.results import final_metrics
from collective_pipeline.io.checkpoints import CheckpointDataset
from collective_pipeline.pipelines.experiments import DEFAULT, EXPERIMENTS, check_read
from collective_pipeline.training import interrupt
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.launch import is_launched
from collective_pipeline.training.progress import duration
from collective_pipeline.training.snapshots import let_go
from collective_pipeline.training.tracking import (
    end_runs_of_the_dead,
    log_model,
    process_tags,
    set_up_store,
    set_up_system_metrics,
    start_run,
)
from collective_pipeline.tuning.tracking import STUDY_TAG

SPARE_BYTES = 64 * 2**20


class CheckBeforeRun:
    """Refuse what cannot work before any work is done."""

    @hook_impl(tryfirst=True)
    def after_context_created(self, context: KedroContext) -> None:
        """Every parameter is known, of its type and in its range, `--params` included."""
        try:
            command = click.get_current_context(silent=True)  # the context of Kedro does not know what is run
            options = {} if command is None else command.params
            names = {options.get("pipeline"), *(options.get("pipelines") or ())} & EXPERIMENTS.keys()
            readers = {name: EXPERIMENTS[name].is_reader_of for name in names}
            self.settings = check_parameters(context.params, experiments=readers)
            self._check_globals(context)
        except UserError as error:
            raise _for_person(error) from error
        # Before kedro-mlflow, which knows these files only afterwards, asks for the tables.
        loader = cast(OmegaConfigLoader, context.config_loader)
        loader.config_patterns.setdefault("mlflow", ["mlflow*", "mlflow*/**", "**/mlflow*"])
        set_up_store(str(loader["mlflow"].get("server", {}).get("mlflow_tracking_uri") or ""))

    def _check_globals(self, context: KedroContext) -> None:
        """The catalog, which cannot see parameters.yml, names files after the same arm and data as the settings."""
        loader = context.config_loader
        for name in ("model_type", "dataset", "deepmoe.dataset", "merged_moe.dataset", "tiny_imagenet.dataset"):
            in_catalog = OmegaConf.select(OmegaConf.create(loader.runtime_params or {}), name)
            if in_catalog is None:
                in_catalog = OmegaConf.select(OmegaConf.create(loader["globals"]), name)
            in_settings = attrgetter(name)(self.settings)
            if in_catalog != in_settings:
                raise UserError(
                    f"{name} is '{in_settings}' in a parameters.yml and '{in_catalog}' in globals.yml: change it in "
                    "the environment's globals.yml, which the catalog reads as well, or with --params"
                )

    # Before kedro-mlflow opens a run, which nobody would close.
    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """What `--params` gives is read; all folders that the run writes to can be written to and have room."""
        paths = (_filepath(catalog, name) for name in pipeline.all_outputs() | _list_states(pipeline))
        folders = {Path(path).parent for path in paths if path is not None}
        names = [DEFAULT if name == "__default__" else name for name in run_params["pipeline_names"] or [DEFAULT]]
        try:
            if is_launched() and names != ["imagenet"]:
                raise UserError(
                    f"torchrun starts several processes, and --pipeline {','.join(names)} trains in one: type kedro "
                    "run, or use it for --pipeline imagenet"
                )
            given = list_nested(run_params["runtime_params"], lambda value: isinstance(value, Mapping))
            check_read([name for name, _ in given], names)
            needed = SPARE_BYTES + 4 * sum(EXPERIMENTS[name].count_weights(self.settings) for name in names)
            for folder in sorted(folders):
                check_writable(folder, needed)
        except UserError as error:
            raise _for_person(error) from error

    @hook_impl(trylast=True)
    def after_pipeline_run(self) -> None:
        """Another command may train what this one has trained."""
        let_go()

    @hook_impl(tryfirst=True)
    def on_pipeline_error(self) -> None:
        """Another command may train what this one has trained."""
        let_go()


def _list_states(pipeline: Pipeline) -> set[str]:
    """The datasets in which its nodes themselves save training that is not over."""
    return {name for name in pipeline.inputs() if name.endswith((".last", ".states"))}


def check_writable(folder: Path, num_bytes: int) -> None:
    """Raise a `UserError` if `folder`, or where it would be made, cannot take `num_bytes`."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}): make it writable, or choose another folder in "
            "conf/base/catalog.yml"
        ) from error
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MB of room and this run may write {num_bytes / 2**20:.0f} MB: free "
            "some, or choose another folder in conf/base/catalog.yml"
        )


class StopCleanly:
    """SIGTERM, Ctrl-C and a lost terminal stop training at the next step, and any later work before that begins."""

    def __init__(self) -> None:
        self.listening = contextlib.ExitStack()

    # Kedro does not tell of an error in the hooks of this moment: no other may come after this one.
    @hook_impl(trylast=True)
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """From now on."""
        self.listening.enter_context(interrupt.listen(saves=bool(_list_states(pipeline))))

    @hook_impl(tryfirst=True)
    def before_node_run(self, node: Node) -> None:
        """No node begins any more; one that trains saves its state."""
        if interrupt.requested():
            interrupt.stop(f"{node.name} did not begin")

    @hook_impl
    def on_node_error(self, error: Exception) -> None:
        """Arms beside one that failed save their state and stop too, or the error would be told only after them."""
        interrupt.request(error)

    @hook_impl(trylast=True)
    def after_pipeline_run(self) -> None:
        """As it was before."""
        self.listening.close()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        """As it was before."""
        self.listening.close()


class TrackArms:
    """One nested MLflow run for each arm: its parameters, live curves, system metrics and final figures.

    kedro-mlflow owns the run of the whole `kedro run`; without it nothing is tracked.
    """

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        self.source_tags: dict[str, str] = {}
        self.command_run: str | None = None

    @hook_impl
    def before_pipeline_run(self) -> None:
        """Name the code and the process that run; end what others left that were killed."""
        self.runs, self.source_tags, self.command_run = {}, {}, None
        run = mlflow.active_run()
        if run is None:
            return
        self.command_run = run.info.run_id
        # Without it MLflow's pages open in their view for language models.
        mlflow.MlflowClient().set_experiment_tag(
            run.info.experiment_id, "mlflow.experimentKind", "custom_model_development"
        )
        mlflow.set_tags(process_tags())
        end_runs_of_the_dead(run.info.experiment_id)
        set_up_system_metrics()
        commit = _git("rev-parse", "HEAD")
        if commit:
            changed = _git("status", "--porcelain", "--untracked-files=no")
            self.source_tags = {"mlflow.source.git.commit": commit, "git_dirty": str(bool(changed))}
            mlflow.set_tags(self.source_tags)

    # After kedro-mlflow has opened its run in the thread of this node.
    @hook_impl(trylast=True)
    def before_node_run(self, node: Node, inputs: dict[str, Any]) -> None:
        """The arm's run is active while its nodes train and evaluate."""
        command_run = mlflow.active_run()
        if command_run is None or not node.tags & {"train", "evaluate"}:
            return
        box = str(node.namespace)
        if box in self.runs:
            mlflow.start_run(run_id=self.runs[box], nested=True)
            return
        settings = next(value for value in inputs.values() if isinstance(value, Parameters))
        arm: Arm = inputs[f"{box}.arm"]
        chosen = {"model_type": arm.model_type, "params": arm.params}
        self.runs[box] = start_run(
            arm.model_type,
            inputs[f"{box}.snapshots"].run_file,
            experiment_id=command_run.info.experiment_id,
            parent=command_run.info.run_id,
            tags={"model_type": arm.model_type, "dataset": settings.dataset} | self.source_tags,
            params=flatten(settings) | {f"arm.{name}": value for name, value in flatten(arm).items()} | chosen,
            log_system_metrics=True,
        )

    @hook_impl
    def after_node_run(self, node: Node, outputs: dict[str, Any]) -> None:
        """Log an evaluated arm's final figures; close the arm's run."""
        if mlflow.active_run() is None or not node.tags & {"train", "evaluate"}:
            return
        if "evaluate" in node.tags:
            mlflow.log_metrics(final_metrics(outputs[f"{node.namespace}.results"]))
        mlflow.end_run()

    @hook_impl
    def on_node_error(self, error: Exception, node: Node) -> None:
        """An arm that failed or was stopped is marked so."""
        if mlflow.active_run() is not None and node.tags & {"train", "evaluate"}:
            mlflow.end_run(_status(error))

    # kedro-mlflow leaves its run open for a second session of the same process, a notebook's for example.
    @hook_impl(trylast=True)
    def after_pipeline_run(self) -> None:
        """End the run of this command."""
        _end_runs("FINISHED")

    @hook_impl(trylast=True)
    def on_pipeline_error(self, error: Exception) -> None:
        """End the run of this command as failed, or as stopped: to kedro-mlflow all errors are failures.

        A command that was refused before anything was tracked leaves no run.
        """
        _end_runs(_status(error))
        if self.command_run is None:
            return
        client = mlflow.MlflowClient()
        client.set_terminated(self.command_run, _status(error))
        refusal = next((cause for cause in _causes(error) if isinstance(cause, UserError)), None)
        if refusal is not None and not isinstance(refusal, Interrupted) and _is_empty(client, self.command_run):
            client.delete_run(self.command_run)


class LogModels:
    """Every evaluated arm's checkpoint as an MLflow model in the arm's run: a model to take away."""

    # Before `TrackArms` ends the arm's run.
    @hook_impl(tryfirst=True)
    def after_node_run(self, node: Node, catalog: DataCatalog, inputs: dict[str, Any]) -> None:
        """Log it, with two raw test images as an example."""
        if mlflow.active_run() is None or "evaluate" not in node.tags:
            return
        name = f"{node.namespace}.checkpoint"
        weights = cast(CheckpointDataset, catalog[name])
        log_model(inputs[name], weights.path, inputs["splits"].test.examples(2))


def _status(error: Exception) -> str:
    return "KILLED" if isinstance(error, Interrupted) else "FAILED"


def _is_empty(client: mlflow.MlflowClient, run_id: str) -> bool:
    """Whether nothing was trained in this run of a command, and no study of a sweep has it as its own."""
    run = client.get_run(run_id)
    inside = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'"
    return STUDY_TAG not in run.data.tags and not client.search_runs([run.info.experiment_id], inside, max_results=1)


def _end_runs(status: str) -> None:
    while mlflow.active_run() is not None:
        mlflow.end_run(status)


class TellAnswer:
    """Ends a run by saying what it found and where the report lies."""

    # Before kedro-mlflow ends the run that the report is logged to.
    @hook_impl(tryfirst=True)
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Log the reporting files to MLflow; print the answer, a table and the report's path."""
        since_start = time.time() - psutil.Process().create_time()
        reports = [name for name in pipeline.all_outputs() if name.endswith(".report")]
        for name in reports:
            box = name.removesuffix(".report")
            report = Path(_filepath(catalog, name) or "")
            if mlflow.active_run() is not None:
                mlflow.log_artifacts(str(report.parent), "reporting")
            summary = catalog.load(f"{box}.summary")
            click.echo(f"\n{summary['answer']}\n")
            if f"{box}.comparison" in pipeline.all_outputs():
                # A sweep tells no top-5 accuracy.
                comparison, top5 = catalog.load(f"{box}.comparison"), summary.get("test_top5_accuracy", {})
                click.echo(format_comparison(comparison, reference=summary["reference"], top5=top5))
            click.echo(f"\n{duration(since_start)} in all{_share_of_training(box, pipeline, catalog, since_start)}")
            click.echo(f"Report: {_relative(report)}\n")
            if "models" in summary:
                files = [f"  {name}: {', '.join(paths)}" for name, paths in summary["models"].items()]
                click.echo("\n".join(["Best models:", *files, f"To use one: {summary['use']}\n"]))
        for name in (name for name in pipeline.all_outputs() if name.endswith(".predictions")):
            click.echo(f"Predictions: {_relative(Path(_filepath(catalog, name) or ''))}")


def _share_of_training(box: str, pipeline: Pipeline, catalog: DataCatalog, since_start: float) -> str:
    """How long the runs of this experiment trained, if it has runs and all of them were in this process alone."""
    if box == "sweep" or f"{box}.runs" not in pipeline.all_outputs():  # others may have worked on a sweep as well
        return ""
    if catalog.load("parameters").get("resume"):  # what earlier commands trained is in the time of the runs
        return ""
    training = catalog.load(f"{box}.runs").groupby(["model_type", "target_params"])["train_seconds"].sum()
    # Arms that trained side by side took as long as the slowest.
    seconds = training.sum() if training.sum() < since_start else training.max()
    return f", {duration(seconds)} of them training" if seconds < since_start else ""


def format_comparison(comparison: pd.DataFrame, *, reference: str, top5: Mapping[str, float]) -> str:
    """The comparison as a table for a terminal.

    Args:
        comparison: A row per arm.
        reference: The arm that differences are to, if it is there.
        top5: Every arm's top-5 accuracy in percent; empty: where it says nothing.
    """
    interval, difference = "{:.2f} to {:.2f}".format, f"minus {reference}"
    arms = comparison.itertuples(index=False)
    table = pd.DataFrame(
        {
            "arm": arm.model_type,
            "parameters": f"{arm.params:,}",
            "test accuracy %": f"{arm.test_accuracy_mean:.2f}",
            "interval": interval(arm.test_accuracy_ci_low, arm.test_accuracy_ci_high),
            "top-5 %": f"{top5.get(str(arm.model_type), math.nan):.2f}",
            difference: f"{arm.difference_to_reference:+.2f}",
            "its interval": interval(arm.difference_ci_low, arm.difference_ci_high),
            "p (Holm)": f"{arm.p_value_holm:.3f}",
            "s/seed": f"{arm.train_seconds:.1f}",
        }
        for arm in arms
    )
    table.loc[comparison["p_value_holm"].isna().to_numpy(), [difference, "its interval"]] = "-"
    table = table.replace({"nan": "-", "+nan": "-", "nan to nan": "-"})
    return table.loc[:, (table != "-").any()].to_string(index=False)


class PlainErrors:
    """Whoever types a command gets one sentence for what they can mend; a script gets the exception itself."""

    def __init__(self) -> None:
        self.states_before: set[tuple[Path, int]] = set()

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Note what earlier runs have left."""
        self.states_before = _find_states(pipeline, catalog)

    # After kedro-mlflow has marked its run as failed.
    @hook_impl(trylast=True)
    def on_pipeline_error(self, error: Exception, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Say it plainly if the user can do something about it."""
        resumes = not _find_states(pipeline, catalog) <= self.states_before
        for cause in _causes(error):
            if isinstance(cause, UserError):
                raise _for_person(cause, resumes=resumes) from error
            if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT}:
                where = f" ({cause.filename})" if cause.filename else ""
                how = " with --params resume=true, which does not train again what is done" if resumes else " again"
                raise _for_person(
                    UserError(
                        f"a result could not be written: {cause.strerror}{where}; mend that and give the same "
                        f"command{how}"
                    )
                ) from error


def _find_states(pipeline: Pipeline, catalog: DataCatalog) -> set[tuple[Path, int]]:
    """The saved states from which a run goes on if it is told to, and when each was written; a sweep is not told."""
    paths = [_filepath(catalog, name) for name in _list_states(pipeline) if name.endswith(".last")]
    places = [Path(path) for path in paths if path is not None]
    # One of several states is a folder, in which a run notes its id before it trains, and may leave a partial file.
    files = [file for place in places for file in (place, *place.glob("[!.]*.safetensors")) if file.is_file()]
    return {(file, file.stat().st_mtime_ns) for file in files}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came of, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _for_person(error: UserError, *, resumes: bool = False) -> Exception:
    if click.get_current_context(silent=True) is None:
        return error
    if isinstance(error, Interrupted):
        return _Stopped(error, resumes=resumes)
    told = str(error)
    if resumes and "resume=true" not in told:
        told += "; what was trained is saved, and --params resume=true goes on from it"
    return click.ClickException(told)


class _Stopped(click.ClickException):
    """Ends the command as its signal would have."""

    def __init__(self, error: Interrupted, *, resumes: bool) -> None:
        super().__init__(f"{error}\nTo go on: {command_to_go_on(sys.argv[1:], resumes=resumes)}")
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance


def command_to_go_on(arguments: Sequence[str], *, resumes: bool) -> str:
    """What was typed; with `resume=true` among its parameters if it has saved a state of training.

    Args:
        arguments: Of the command.
        resumes: Whether it has.
    """
    arguments = list(arguments)
    resumes = resumes and not any("resume=true" in argument for argument in arguments)
    if is_launched():
        return "the same torchrun command" + " with resume=true among its --params" * resumes
    if arguments[:1] != ["run"]:  # python -m collective_pipeline
        arguments.insert(0, "run")
    if resumes:
        for place, argument in enumerate(arguments):
            if argument == "--params" and place + 1 < len(arguments):
                arguments[place + 1] += ",resume=true"
                break
            if argument.startswith("--params="):
                arguments[place] += ",resume=true"
                break
        else:
            arguments += ["--params", "resume=true"]
    return shlex.join(["kedro", *arguments])


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _filepath(catalog: DataCatalog, name: str) -> str | None:
    """Where a dataset is kept, or None if it is only in memory."""
    path = getattr(catalog.get(name), "_filepath", None)
    return None if path is None else str(path)


def _git(*arguments: str) -> str:
    """What git says of the project's folder, or nothing where there is no git."""
    git = shutil.which("git")
    if git is None:
        return ""
    answer = subprocess.run([git, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip()

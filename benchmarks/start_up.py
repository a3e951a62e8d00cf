"""Where the time of a short `kedro run` goes that is not training: until its first step, after its last, in imports.

    python benchmarks/start_up.py [--size phase1] [--device cuda] [--repeats 3] [--params training.epochs=1]

Runs the real command in a copy of the project with its embedded MNIST: once as after installing, when Python compiles
every module and MLflow makes its database; then as all later runs are, and under `python -X importtime`, in turn.
Moments are told by a Kedro plugin that lies beside the copy, and count from when the command was typed. An import
counts for the listed package that first brought it along: pandas imported by MLflow is pandas, but SQLAlchemy imported
by it is MLflow. Medians over the repeats; the first run happens once.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from collective_pipeline.training.runtime import choose_device
from conditions import ROOT, describe, make_parser

KEDRO = Path(sys.executable).with_name("kedro")
MOMENTS = {
    "project": "the command and the project's hooks are imported",
    "pipelines": "pipelines are imported, the catalog is made",
    "tracked": "the MLflow run is open",
    "training": "images are split, training begins",
    "step": "the first step begins",
    "trained": "training ends",
    "reported": "evaluated, compared, reported, tracked",
    "ended": "the process ends",
    "all but training": "all of it but training",
}
PACKAGES = {
    "torch": ("torch", "torchvision"),
    "mlflow": ("mlflow", "kedro_mlflow"),
    "kedro": ("kedro", "kedro_datasets", "kedro_viz"),
    "pandas": ("pandas", "pyarrow"),
    "plotly": ("plotly",),
    "scipy": ("scipy",),
    "ours": ("collective_pipeline",),
}
REST = "Python's own, and what no other brought along"
# Installed beside the copy, where Kedro finds it as it finds kedro-mlflow.
PLUGIN = """
import os
import time

from kedro.framework.hooks import hook_impl


def tell(moment):
    with open(os.environ["START_UP_MOMENTS"], "a") as file:
        print(moment, time.time(), file=file)


class Moments:
    @hook_impl(tryfirst=True)
    def after_context_created(self):
        tell("project")

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self):
        tell("pipelines")

    @hook_impl(trylast=True)
    def before_node_run(self, node):
        tell("tracked")
        if "train" in node.tags:
            from collective_pipeline.training import train

            fit = train.fit

            def timed(*arguments, watch=iter, **options):
                def first(updates):
                    for update in watch(updates):
                        tell("step")
                        yield update

                tell("training")
                result = fit(*arguments, watch=first, **options)
                tell("trained")
                return result

            train.fit = timed

    @hook_impl(trylast=True)
    def after_pipeline_run(self):
        tell("reported")


moments = Moments()
"""


def make_copy(folder: Path) -> Path:
    """The project with its embedded MNIST, and nothing of earlier runs; the plugin beside it."""
    copy, plugin = folder / "project", folder / "plugin"
    shutil.copytree(ROOT / "conf", copy / "conf", ignore=shutil.ignore_patterns("local"))
    shutil.copytree(ROOT / "data" / "01_raw" / "mnist", copy / "data" / "01_raw" / "mnist")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "conf/local"):
        (copy / name).mkdir()
    about = plugin / "start_up_moments-1.dist-info"
    about.mkdir(parents=True)
    (plugin / "start_up_moments.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: start-up-moments\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[kedro.hooks]\nmoments = start_up_moments:moments\n")
    return copy


def run(copy: Path, arguments: Sequence[str], *interpreter: str) -> tuple[dict[str, float], str]:
    """Seconds from typing the command to each moment, and what it wrote to its error stream."""
    told = copy.parent / "moments.txt"
    told.unlink(missing_ok=True)
    environment = os.environ | {
        "START_UP_MOMENTS": str(told),
        "PYTHONPATH": str(copy.parent / "plugin"),
        "PYTHONPYCACHEPREFIX": str(copy.parent / "bytecode"),
        "DO_NOT_TRACK": "1",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.time()
    result = subprocess.run(
        [sys.executable, *interpreter, KEDRO, "run", *arguments],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    ended = time.time()
    if result.returncode:
        raise RuntimeError(result.stderr)
    moments: dict[str, float] = {}
    for line in told.read_text().splitlines():
        name, when = line.split()
        moments.setdefault(name, float(when) - started)  # of those told often, the first
    return moments | {"ended": ended - started}, result.stderr


def sum_imports(report: str) -> dict[str, float]:
    """Seconds for each package, from what `-X importtime` reports: a line for each module, below those it imports."""
    owners = {name: package for package, names in PACKAGES.items() for name in names}
    seconds: dict[str, float] = defaultdict(float)
    above: list[str] = []
    for match in reversed(list(re.finditer(r"^import time:\s*(\d+) \|\s*\d+ \| ( *)(\S+)$", report, re.MULTILINE))):
        depth = len(match[2]) // 2
        del above[depth:]
        above.append(owners.get(match[3].partition(".")[0], above[-1] if above else REST))
        seconds[above[-1]] += int(match[1]) / 1e6
    return seconds


def print_row(name: str, first: str, later: str) -> None:
    print(f"{name:<52}{first:>12}{later:>12}")


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--params", default="training.epochs=1,seeds=42,data.val_fraction=0.9", help="of the run; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    environment = ["--env", "debug"] if options.size == "debug" else []
    arguments = [*environment, "--params", f"device={options.device},{options.params}"]

    print(f"{describe(choose_device(options.device))}\nkedro run {' '.join(arguments)}, {options.repeats} repeats")
    later: list[dict[str, float]] = []
    imports: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        copy = make_copy(Path(name))
        first, _ = run(copy, arguments)
        for _ in range(options.repeats):
            later.append(run(copy, arguments)[0])
            imports.append(sum_imports(run(copy, arguments, "-X", "importtime")[1]))

    print_row("seconds from typing the command until", "first run", "later runs")
    for moments in (first, *later):
        moments["all but training"] = moments["ended"] - moments["trained"] + moments["training"]
    for name, text in MOMENTS.items():
        print_row(text, f"{first[name]:.2f}", f"{statistics.median(moments[name] for moments in later):.2f}")
    print_row("of these, importing", "", f"{statistics.median(sum(each.values()) for each in imports):.2f}")
    for package in (*PACKAGES, REST):
        names = ", ".join(PACKAGES.get(package, ()))
        seconds = statistics.median(each.get(package, 0.0) for each in imports)
        print_row(f"  {package}{f' ({names})' if names else ''}", "", f"{seconds:.2f}")


if __name__ == "__main__":
    main()

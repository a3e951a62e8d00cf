"""`python -m collective_pipeline` is `kedro run`; of several that torchrun starts, the first one is."""

import os
import sys
from pathlib import Path

from collective_pipeline.startup import check_command, check_environment, quieten, tell_error

if __name__ == "__main__":
    sys.excepthook = tell_error  # the imports below take seconds

from kedro.framework.cli.utils import find_run_command
from kedro.framework.project import configure_project

from collective_pipeline.training.launch import end, is_launched
from collective_pipeline.training.rank import follow

if __name__ == "__main__" and is_launched() and os.environ["RANK"] != "0":
    follow()
    end()
elif __name__ == "__main__":
    quieten()
    check_environment(sys.argv[1:])
    package_name = Path(__file__).parent.name
    configure_project(package_name)
    check_command.before_command_run(["run", *sys.argv[1:]])  # a hook of Kedro's own command, which this is not
    find_run_command(package_name)()

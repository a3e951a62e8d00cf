"""What happens before Kedro starts."""

import warnings


def quieten() -> None:
    """Ignore the warnings that libraries raise about each other on every command, and that no user can act on."""
    # kedro 1.7 calls omegaconf 2.4 by a name that it deprecates.
    warnings.filterwarnings("ignore", message=r"\s*register_new_resolver\(\) is deprecated")
    # mlflow about a class of its own, when it is imported.
    warnings.filterwarnings("ignore", message=r".*Add type hints to the `predict` method")
    # `kedro run --pipeline` is what people type; Kedro takes `--pipelines` as well.
    warnings.filterwarnings("ignore", message="Option '--pipeline' is deprecated")

import pytest

from collective_pipeline.hooks import command_to_go_on


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("run", "kedro run --params resume=true"),
        ("run --params seeds=1", "kedro run --params seeds=1,resume=true"),
        ("run --params=seeds=1 --env debug", "kedro run --params=seeds=1,resume=true --env debug"),
        ("run --pipeline sweep --params seeds=1", "kedro run --pipeline sweep --params seeds=1"),
        ("run --pipeline=sweep", "kedro run --pipeline=sweep"),
    ],
)
def test_who_was_stopped_is_told_the_whole_command_to_go_on(typed, told):
    assert command_to_go_on(typed.split()) == told

"""What an arm's rows say together: the fields of the original's evaluation, by seed and as means."""

import json
import math

import pandas as pd

from collective_pipeline.evaluation.results import OF_CLASS, summarise_runs, top5_by_arm

RUN = {"model_type": "collective", "epochs": 5, "early_stopped": False, "final_train_loss": 0.25}
RUN |= {"final_train_accuracy": 99.0, "val_accuracy": 97.5, "test_accuracy": 97.0, "test_loss": 0.1}
RUN |= {"test_accuracy_of_cat": 96.0, "test_accuracy_of_dog": 98.0}
FIELDS = {
    "overall_accuracy",
    "class_accuracies",
    "best_accuracy",
    "total_epochs",
    "early_stopped",
    "final_train_loss",
    "final_train_accuracy",
    "final_test_accuracy",
}


def test_every_arm_has_means_over_seeds_and_the_seeds_themselves():
    other = {"epochs": 3, "early_stopped": True, "test_accuracy": 95.0, "test_accuracy_of_dog": 94.0}
    runs = pd.DataFrame([RUN | {"seed": 1}, RUN | {"seed": 2} | other, RUN | {"seed": 1, "model_type": "deep"}])
    told = json.loads(json.dumps(summarise_runs(runs)))
    collective = told["collective"]

    assert list(told) == ["collective", "deep"]
    assert collective.keys() == FIELDS | {"seeds"}
    assert [seed.keys() for seed in collective["seeds"]] == [FIELDS | {"seed"}] * 2
    assert collective["overall_accuracy"] == collective["final_test_accuracy"] == 96.0
    assert collective["class_accuracies"] == {"cat": 96.0, "dog": 96.0}
    assert collective["total_epochs"] == 4 and collective["early_stopped"] is True
    assert collective["best_accuracy"] == 97.5 and collective["final_train_loss"] == 0.25
    first, second = collective["seeds"]
    assert first["seed"] == 1 and first["early_stopped"] is False and first["class_accuracies"]["dog"] == 98.0
    assert second["overall_accuracy"] == 95.0 and second["total_epochs"] == 3


def test_what_a_diverged_seed_does_not_have_is_null_and_in_no_mean():
    """JSON has no NaN."""
    diverged = dict.fromkeys(("test_accuracy", "val_accuracy", "test_accuracy_of_cat", "final_train_loss"), math.nan)
    told = summarise_runs(pd.DataFrame([RUN | {"seed": 1}, RUN | {"seed": 2} | diverged]))["collective"]

    assert json.loads(json.dumps(told, allow_nan=False))["seeds"][1]["overall_accuracy"] is None
    assert told["overall_accuracy"] == 97.0 and told["class_accuracies"]["cat"] == 96.0
    alone = summarise_runs(pd.DataFrame([RUN | {"seed": 2} | diverged]))["collective"]
    assert alone["overall_accuracy"] is None and alone["class_accuracies"] == {"cat": None, "dog": 98.0}


def test_top5_accuracy_is_told_of_those_who_know_more_than_ten_classes():
    """Its mean over the seeds that have one, in the arms' order."""
    arms = {"resnet50": [90.0, math.nan, 91.0], "narrow": [80.5, 81.0, 81.5]}

    def told(num_classes):
        of_class = {f"{OF_CLASS}{number}": 50.0 for number in range(num_classes)}
        return top5_by_arm(
            [pd.DataFrame([{"model_type": a, "test_top5_accuracy": v} | of_class for v in arms[a]]) for a in arms]
        )

    assert list(told(11).items()) == [("resnet50", 90.5), ("narrow", 81.0)]
    assert told(10) == {}

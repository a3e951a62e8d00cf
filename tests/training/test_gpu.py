"""What the GPU's figures promise: each arm's own time, joules that sum to the card's, nothing half known."""

import threading
import time

import pandas as pd
import pynvml
import pytest
import torch
from tests.conftest import wait_until

from collective_pipeline.config import Parameters
from collective_pipeline.evaluation.gpu import COST_COLUMNS, USAGE_COLUMNS
from collective_pipeline.evaluation.results import tabulate
from collective_pipeline.pipelines.arm.nodes import evaluate
from collective_pipeline.training import gpu, interrupt, train
from collective_pipeline.training.gpu import Meter, Usage
from collective_pipeline.training.train import snapshots_at, train_arm

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
LOST, NOT_SUPPORTED = pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_NOT_SUPPORTED


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No reading between those that a test asks for."""
    monkeypatch.setattr(gpu, "SECONDS_BETWEEN_READINGS", 3600)


def reading_threads():
    return {thread for thread in threading.enumerate() if thread.name == "gpu"}


def measure(driver, seconds: float = 10) -> dict[str, float]:
    """The figures of an arm that has the card to itself for so long."""
    driver.now = 100.0
    with Meter(CUDA, Usage()) as meter:
        driver.now += seconds
        return meter.read().figures


def test_all_figures_of_the_card_that_the_run_uses(driver):
    """Found by its own name: CUDA_VISIBLE_DEVICES makes the driver's second card torch's first."""
    assert measure(driver) == {
        "gpu_utilization_mean": 40,
        "gpu_utilization_peak": 40,
        "gpu_memory_mb_mean": 2000,
        "gpu_memory_mb_peak": 2000,
        "gpu_memory_mb_total": 8000,
        "gpu_power_watts_mean": 300,
        "gpu_power_watts_peak": 300,
        "gpu_power_watts_limit": 700,
        "gpu_temperature_celsius_mean": 55,
        "gpu_temperature_celsius_peak": 55,
        "joules": 3000,
        "gpu_seconds": 10,
    }
    assert tuple(measure(driver)) == (*USAGE_COLUMNS, "gpu_seconds")


def test_means_are_over_time_and_over_the_arm_s_time_only(driver):
    driver.now, driver.busy = 0.0, 100
    with Meter(CUDA, Usage()):
        driver.now = 50.0
        with Meter(CUDA, Usage()) as meter:
            for seconds, busy in ((1, 80), (3, 20)):
                driver.now, driver.busy = driver.now + seconds, busy
                meter.read()
        driver.now, driver.busy = 90.0, 100
    assert meter.usage.figures["gpu_utilization_mean"] == pytest.approx((80 + 3 * 20) / 4)
    assert meter.usage.figures["gpu_utilization_peak"] == 80


@pytest.mark.parametrize("refused", [(), (ENERGY,)], ids=["counted by the card", "integrated from its power"])
def test_joules_and_seconds_of_arms_side_by_side_sum_to_the_card_s(driver, refused):
    driver.now, driver.refused = 0.0, dict.fromkeys(refused, NOT_SUPPORTED)
    with Meter(CUDA, Usage()) as long:
        driver.now = 4.0
        with Meter(CUDA, Usage()) as short:
            driver.now = 6.0
        driver.now = 10.0
    assert short.usage.joules == pytest.approx(2 * 300 / 2)
    assert long.usage.joules == pytest.approx(8 * 300 + 2 * 300 / 2)
    assert (short.usage.gpu_seconds, long.usage.gpu_seconds) == pytest.approx((2 / 2, 8 + 2 / 2))
    driver.now = 20.0  # the card is left alone meanwhile
    assert measure(driver, 1)["joules"] == pytest.approx(300)


def test_what_is_no_training_counts_for_nobody_or_for_those_beside(driver):
    driver.now = 0.0
    with Meter(CUDA, Usage()) as paused, Meter(CUDA, Usage()) as other:
        driver.now = 2.0
        with paused.paused():
            driver.now = 5.0
        driver.now = 6.0
    assert (paused.usage.seconds, other.usage.seconds) == pytest.approx((3, 6))
    assert (paused.usage.joules, other.usage.joules) == pytest.approx((3 * 150, 3 * 150 + 3 * 300))
    driver.now = 7.0
    with Meter(CUDA, Usage()) as alone, alone.paused():
        driver.now = 9.0
    assert alone.usage.joules is None or alone.usage.joules == 0


def test_usage_of_several_times_is_that_of_all_of_it():
    parts = [Usage(1, {"power": 8.0}, {"power": 9.0}, 8.0), Usage(3, {"power": 4.0}, {"power": 5.0}, 12.0)]
    assert sum(parts, Usage()) == Usage(4, {"power": 5.0}, {"power": 9.0}, 20.0)


@pytest.mark.parametrize("dark", [Usage(1.0), Usage(1.0, {"memory": 1.0}, {"memory": 1.0})])
def test_what_was_not_known_all_the_time_is_left_out(dark):
    """Energy of half the training would be a wrong number of joules."""
    known = Usage(1.0, {"power": 8.0}, {"power": 9.0}, 8.0)
    assert (known + dark).figures == (dark + known).figures == {}


def test_a_laptop_that_does_not_tell_its_power_tells_the_rest(driver):
    names = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", ENERGY)
    driver.refused = dict.fromkeys(names, NOT_SUPPORTED)
    told = {name for name in (*USAGE_COLUMNS, "gpu_seconds") if "power" not in name and name != "joules"}
    assert set(measure(driver)) == told


def test_a_part_of_a_card_tells_its_memory(driver):
    """MIG: it has another kind of name, and neither utilisation nor power."""
    driver.visible = "MIG-b"
    names = ("UtilizationRates", "PowerUsage", "EnforcedPowerLimit", "Temperature", "TotalEnergyConsumption")
    driver.refused = {f"nvmlDeviceGet{name}": NOT_SUPPORTED for name in names}
    memory = {"gpu_memory_mb_mean", "gpu_memory_mb_peak", "gpu_memory_mb_total"}
    assert set(measure(driver)) == memory | {"gpu_seconds"}


@pytest.mark.parametrize("query", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_the_driver_s_library_all_but_the_time_is_empty_and_told_once(driver, caplog, query):
    driver.refused = {query: pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}
    assert measure(driver) == measure(driver) == {"gpu_seconds": 10}
    (message,) = caplog.messages
    assert "NVML Shared Library Not Found" in message and "stay empty" in message


def test_a_card_that_is_lost_leaves_nothing_half_known(driver):
    driver.now = 0.0
    with Meter(CUDA, Usage()) as meter:
        driver.now = 5.0
        assert meter.read().figures
        driver.refused = {name: LOST for name in vars(pynvml) if name.startswith("nvmlDeviceGet")}
        driver.now = 9.0
    assert meter.usage.figures == {"gpu_seconds": 9}


def test_where_there_is_no_gpu_no_driver_is_asked(driver):
    driver.refused = {"nvmlInit": LOST}
    before = reading_threads()
    with Meter(CPU, Usage()) as meter:
        assert reading_threads() <= before
        assert meter.read().figures == {}
    assert driver.num_readings == 0


def test_the_card_is_read_while_an_arm_trains_and_no_longer(driver, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS_BETWEEN_READINGS", 0.001)
    before = reading_threads()  # on a busy machine those of other tests may be about to end
    with Meter(CUDA, Usage()) as meter:
        (thread,) = reading_threads() - before
        wait_until(lambda: driver.num_readings >= 5)
        assert meter.usage.seconds > 0  # nobody asked for it
    thread.join(120)
    assert not thread.is_alive()


def test_tables_hold_what_training_used(driver, arm, splits, training):
    """Joules of a seed as its seconds, an equal part of the arm's; images for each of the arm's joules."""
    settings = Parameters(seeds=(1, 2, 3), training=training, device="cpu")
    checkpoint, fit = train_arm(arm, splits, training, seeds=settings.seeds, device=CPU)
    history = pd.DataFrame(fit.history)
    results = evaluate(checkpoint, history, splits, settings, CPU)

    joules = history["joules"].dropna()
    assert joules.is_monotonic_increasing and joules.iloc[-1] > 0
    assert results["joules"].sum() == pytest.approx(joules.iloc[-1])
    images = results["samples_per_second"] * history["seconds"].max()
    batches = len(splits.train) // training.batch_size
    assert images.to_numpy() == pytest.approx(3 * training.epochs * batches * training.batch_size)
    assert results["images_per_joule"].to_numpy() == pytest.approx((images / joules.iloc[-1]).to_numpy())
    assert set(results["gpu_utilization_mean"]) == {40} and set(results["gpu_power_watts_limit"]) == {700}
    assert 3600 * results["gpu_hours"].sum() == pytest.approx(history["gpu_seconds"].max(), abs=1e-3)
    assert 3.6e6 * results["energy_kwh"].to_numpy() == pytest.approx(results["joules"].to_numpy())
    assert results["cost"].isna().all()


def test_cost_is_gpu_hours_times_their_price(driver, arm, splits, training):
    checkpoint, fit = train_arm(
        arm, splits, training, seeds=(1, 2), device=CPU, callbacks=[ten_seconds_an_epoch(driver)]
    )
    history, test = pd.DataFrame(fit.history), {"accuracy": [90.0, 91.0]}

    def table(**about):
        return tabulate(checkpoint, history, test, training, **about)

    one = table(price_per_gpu_hour=3.6)
    seconds = 10 * (training.epochs - 1) / 2
    assert one["gpu_hours"].tolist() == pytest.approx([seconds / 3600] * 2)
    assert one["cost"].tolist() == pytest.approx([seconds / 1000] * 2)


def test_devices_at_work_alike_are_counted_each(driver):
    driver.now = 0.0
    with gpu.Meter(torch.device("cuda"), Usage(), number=4) as four:
        driver.now = 10.0

    assert four.usage.gpu_seconds == 40 and four.usage.joules == pytest.approx(4 * 10 * driver.watts)


def test_without_a_gpu_the_columns_are_empty(arm, splits, training):
    settings = Parameters(seeds=(1, 2), training=training, device="cpu", price_per_gpu_hour=2.0)
    checkpoint, fit = train_arm(arm, splits, training, seeds=settings.seeds, device=CPU)
    results = evaluate(checkpoint, pd.DataFrame(fit.history), splits, settings, CPU)
    assert results[[*USAGE_COLUMNS, "images_per_joule", *COST_COLUMNS]].isna().all(axis=None)


def ten_seconds_an_epoch(driver):
    """A callback; nothing passes after the last epoch, which is no longer training."""
    driver.now = 0.0

    def pass_time(epoch):
        driver.now += 0 if epoch.restored or epoch.finished else 10

    return pass_time


def test_a_run_that_goes_on_counts_what_it_used_before(driver, arm, splits, training, tmp_path):
    """And what was not trained again is told with what it used when it was."""
    settings = Parameters(seeds=(1, 2), training=training, device="cpu")
    pass_time = ten_seconds_an_epoch(driver)

    def fit(*callbacks, resume: bool):
        own = settings.model_copy(update={"resume": resume})
        saved = snapshots_at(tmp_path / "last.safetensors", arm, splits, own, CPU)
        with interrupt.listen():
            return train_arm(arm, splits, training, seeds=(1, 2), device=CPU, callbacks=callbacks, snapshots=saved)[1]

    def stop(epoch):
        if epoch.number == 2:
            interrupt.request(interrupt.Interrupted("enough"))

    with pytest.raises(interrupt.Interrupted):
        fit(pass_time, stop, resume=False)
    driver.now += 1000
    resumed = fit(pass_time, resume=True)
    assert resumed.epochs[-1].usage.joules == pytest.approx(300 * 10 * (training.epochs - 1))
    driver.now += 1000
    assert fit(pass_time, resume=True).epochs[-1].usage == resumed.epochs[-1].usage


def test_groups_of_seeds_use_what_all_of_them_used(driver, arm, splits, training, monkeypatch):
    monkeypatch.setattr(train, "groups_that_fit", lambda seeds, *_, **__: [[seed] for seed in seeds])
    _, fit = train_arm(arm, splits, training, seeds=(1, 2, 3), device=CPU, callbacks=[ten_seconds_an_epoch(driver)])
    assert fit.epochs[-1].usage.joules == pytest.approx(3 * 300 * 10 * (training.epochs - 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_card_tells_what_it_uses():
    with Meter(CUDA, Usage()) as meter:
        x = torch.randn(2048, 2048, device="cuda")
        for _ in range(200):
            x = torch.nn.functional.normalize(x @ x)
        torch.cuda.synchronize()
        time.sleep(0.5)
        figures = meter.read().figures
    assert 0 < figures["gpu_memory_mb_peak"] <= figures["gpu_memory_mb_total"]
    assert 0 <= figures["gpu_utilization_mean"] <= figures["gpu_utilization_peak"] <= 100

"""Settings of every test: eight fake CPU devices, and compiled programs kept between runs and shared by workers."""

import os
import signal
from collections.abc import Generator

import pytest

IS_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
"""Where nobody reads which tests were skipped."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimize", action="store_true", help="compile as users do, with all of LLVM's optimisations")


def pytest_configure(config: pytest.Config) -> None:
    # A shell lets what it starts in the background ignore Ctrl-C, and tests would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Read by jax when it is first imported, here and in the processes that tests start.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if not config.getoption("--optimize"):
        # Most of the time goes into compiling what then runs once: LLVM leaves out what only makes programs faster.
        flags.append("--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


MAY_LACK = "tokamax"
"""A library for GPUs alone, which CI does without: its tests are for whoever installs the extra mosaic_gpu."""


def _refuse_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    """In CI a comparison that is left out for want of what it compares with has failed."""
    reason = str(report.longrepr)
    if IS_CI and report.outcome == "skipped" and "could not import" in reason and f"'{MAY_LACK}'" not in reason:
        report.outcome = "failed"
        report.longrepr = f"In CI nothing may be skipped for a missing package: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report

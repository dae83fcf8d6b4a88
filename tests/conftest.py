"""Settings of every test: eight fake CPU devices, and compiled programs kept between runs and shared by workers."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling what then runs once: LLVM leaves out what only makes programs faster.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()


def pytest_configure(config: pytest.Config) -> None:
    # Read by jax when it is first imported, here and in the processes that tests start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

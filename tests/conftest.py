"""Settings of every test: eight fake CPU devices, and compiled programs kept between runs and shared by workers."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()


def pytest_configure(config: pytest.Config) -> None:
    # Read by jax when it is first imported, here and in the processes that tests start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax"))

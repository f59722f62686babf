"""Shared by all tests: one compilation cache, the CPU, no data set outside a temporary directory."""

import gc
import os
import tempfile
from importlib.metadata import version

import pytest

# Before jax is imported, here and in the processes that tests start.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(tempfile.gettempdir(), f'jaxgen-tests-{os.getuid()}'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
# Never a person's own: the sets drawn here are small, see support.py.
os.environ['TFDS_DATA_DIR'] = os.path.join(tempfile.gettempdir(), f'jaxgen-tests-data-{os.getuid()}')
# Nor a person's own key and caches.
os.environ['XDG_CACHE_HOME'] = os.path.join(tempfile.gettempdir(), f'jaxgen-tests-cached-{os.getuid()}')
os.environ['XDG_CONFIG_HOME'] = os.path.join(tempfile.gettempdir(), f'jaxgen-tests-config-{os.getuid()}')
# Nor images that another version of the code has decoded.
os.environ['XDG_CACHE_HOME'] = os.path.join(tempfile.gettempdir(), f'jaxgen-tests-cache-{os.getuid()}')
# Workers share the cores: OpenMP's threads (of torch and scikit-learn) would spin while they wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Most of a test's time is compiling, and tiny programs need no optimising. XLA's older code for fused operations
# compiles in half the time or less, and programs in one piece in three quarters of it, the workers having a core each.
# jaxlib 0.12 has not all of these flags, and ends the process at those that it does not know.
HAS_OLDER = version('jaxlib').startswith('0.10.')
OLDER = ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1' if HAS_OLDER else ''
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0' + OLDER)

# Tracing makes millions of small objects; looking through them for cycles at every 700 takes a tenth of its time.
gc.set_threshold(100_000, 10, 10)


def pytest_runtest_teardown(item, nextitem):
    # What one file compiled is of no use to the next, and a process that keeps it all grows to several gigabytes.
    if nextitem is None or nextitem.module is not item.module:
        import jax

        jax.clear_caches()


@pytest.fixture
def no_compile():
    """Fails the test if XLA compiles anything."""
    import jax

    compiled = []

    def listen(event: str, duration: float, **_):
        if 'backend_compile' in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, 'compiled before the mistake was reported'

"""Skips tests and benchmarks whose packages are not installed, with the reason, instead of letting them fail."""

import re
import traceback
from importlib.util import find_spec

import pytest

__all__ = ["pytest_make_collect_report", "pytest_runtest_call", "pytest_runtest_setup"]


def _reason(message: str) -> str | None:
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'$", message, re.MULTILINE)
    if missing is None or missing[1].split(".")[0] in ("ajepa", "ajepa_kernels"):
        return None
    try:
        absent = find_spec(missing[1]) is None  # the full name counts: cuBLAS alone already provides `nvidia`
    except ImportError:
        absent = True
    return f"needs {missing[1]}, which is not installed" if absent else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    reason = _reason(str(report.longrepr)) if report.failed else None
    if reason:
        report.outcome, report.longrepr = "skipped", (str(collector.path), None, f"Skipped: {reason}")
    return report


def _skip_missing(item):
    try:
        return (yield)
    except Exception as error:
        reason = _reason("".join(traceback.format_exception(error)))  # includes causes and the output of subprocesses
        if reason:
            pytest.skip(reason)
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_skip_missing)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skip_missing)

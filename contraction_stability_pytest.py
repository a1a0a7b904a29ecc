"""What pytest loads by entry point: it turns ``stability.pytest_plugin`` on, and never breaks a run that has no use for it.

The packages have plain names. Where a project's own folder ``stability`` or ``optim`` stands before them on ``sys.path``, the
plugin stays off and the header of the run says why.
"""

_why_off = ""


def pytest_addoption(parser, pluginmanager):
    global _why_off
    try:
        from stability import pytest_plugin
    except ImportError as error:
        _why_off = str(error)
        return
    if not pluginmanager.is_registered(pytest_plugin):  # by -p, or in pytest_plugins
        pluginmanager.register(pytest_plugin, pytest_plugin.NAME)


def pytest_report_header():
    return f"contraction-stability: plugin off, {_why_off}" if _why_off else None

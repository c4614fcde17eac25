"""Results for people: tables on the terminal and a page; no torch."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.report.console import print_json as print_json
    from fedcompo.report.console import say as say
    from fedcompo.report.pages import write_report as write_report
    from fedcompo.report.results import print_results as print_results
    from fedcompo.report.units import duration as duration
    from fedcompo.report.units import size as size

__all__, __getattr__, __dir__ = face(__name__)

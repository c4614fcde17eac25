"""``python -m fedcompo.cli`` is the ``fedcompo`` command."""

from fedcompo.cli.app import main

main()

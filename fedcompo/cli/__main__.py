"""``python -m fedcompo.cli`` is the ``fedcompo`` command."""

from fedcompo.cli.app import main

if __name__ == "__main__":
    main()

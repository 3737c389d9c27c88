"""``python -m dd_lightning`` is ``dd-lightning``."""

from dd_lightning.cli.main import main

if __name__ == "__main__":
    main()

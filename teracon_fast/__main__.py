"""`python -m teracon_fast ...` is the command line `teracon ...`."""

from teracon_fast.cli import main

if __name__ == "__main__":
    main()

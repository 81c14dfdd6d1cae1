"""`python -m qgen`: the command line."""

from qgen.cli import main

if __name__ == "__main__":
    main()

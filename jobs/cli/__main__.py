"""How a submitted job starts: it has our code in its working directory."""

from jobs.cli import main

if __name__ == "__main__":
    main()

"""The command flagembedding-matryoshka, as `python -m flagembedding_matryoshka`."""

from flagembedding_matryoshka.cli.main import main

if __name__ == "__main__":
    main()

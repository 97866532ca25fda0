"""The command `python -m flagembedding_matryoshka.finetune.lists`."""

from flagembedding_matryoshka.mining.lists import main

if __name__ == "__main__":
    main()

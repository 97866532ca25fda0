"""The command `python -m flagembedding_matryoshka.finetune.hard_negatives`."""

from flagembedding_matryoshka.mining.negatives import main

if __name__ == "__main__":
    main()

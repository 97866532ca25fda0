"""The command `python -m flagembedding_matryoshka.finetune.teacher_scores`."""

from flagembedding_matryoshka.mining.scores import main

if __name__ == "__main__":
    main()

import os

# Before torch reads it, here and in the processes that tests start: a second thread gains nothing for tiny tensors, and
# waiting for it on a busy machine takes most of the time.
os.environ["OMP_NUM_THREADS"] = "1"

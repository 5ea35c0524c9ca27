"""Help for tests of the bridge packages and of their users: nothing here is imported by the library itself.

* `ranks` keeps a pool of processes that run functions as the ranks of a torch.distributed job;
* `hf_models` makes tiny transformers models in which no two weights are equal;
* `mcore_jobs` loads checkpoints into real megatron-core models on such ranks, and runs them.
"""

"""Help for tests of the bridge packages and of their users: nothing here is imported by the library itself.

`ranks` keeps a pool of processes that run functions as the ranks of a torch.distributed job.
"""

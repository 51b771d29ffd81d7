"""What bench_peers.py is made of: contenders, how they are built, the processes that run them, tables and bars."""

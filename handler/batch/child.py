"""`python -m handler.batch.child FD`: a worker in a process of its own, asked over a socket. Only
`handler.batch.process` starts it."""

import pickle
import sys
from multiprocessing.connection import Connection

from handler.batch.shard import Worker


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        worker = Worker(connection.recv())
        connection.send((True, None))
        while True:
            method, argument = connection.recv()
            connection.send((True, getattr(worker, method)(argument)))
    except EOFError:
        return  # whoever asked is gone
    except Exception as error:
        connection.send((False, pickle.dumps(error)))


if __name__ == "__main__":
    main()

import time

from harness import *


def test_try(site):
    d = site.format()
    t = time.time()
    populate(d, ["a"], [File("a/b", b"hello")])
    print("pop", time.time() - t)
    t = time.time()
    with site.mounted(d, "fastpath=off") as m:
        print("mount", time.time() - t, m.warnings)
        t = time.time()
        print(m.host_processes())
        print(succeed("find", m.path, "-ls"))
        t = time.time()
        print(client("result=os.listdir(arguments[0])", m.path), time.time() - t)
        t = time.time()
    print("umount", time.time() - t)

# A test aid, loaded into `nvflare provision` by PYTHONPATH. NVFlare itself is as
# it comes from PyPI; this leaves out its fixed sleep of 100 s after each site, and
# keeps a copy of each kit, which NVFlare deletes once it has the bundle.
import os
import shutil
import time

sleep, rmtree = time.sleep, shutil.rmtree


def no_sleep(seconds):
    if seconds == 100.0:
        print("test aid: NVFlare's sleep of 100 s is left out", flush=True)
    else:
        sleep(seconds)


def keep_kit(path, *args, **kwargs):
    if os.path.isdir(os.path.join(path, "startup")):
        shutil.copytree(path, os.path.join(os.environ["KEEP_KITS"], os.path.basename(path)), symlinks=True)
    rmtree(path, *args, **kwargs)


time.sleep, shutil.rmtree = no_sleep, keep_kit

#!/usr/bin/env bash
# Runs the tests against a library built with a sanitizer, in a copy of the tree under build/, so that neither the
# library nor the objects of the normal build are touched.
#
#   tools/sanitize.sh address|undefined|thread [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

kind=$1
shift
root=$PWD
python=$root/.venv/bin/python
tree=$root/build/sanitize-$kind

# tar keeps the times of the files, and the objects lie in the copy's own build/: a rerun compiles only what changed.
mkdir -p "$tree"
find "$tree" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
tar --create --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' . | tar --extract --directory "$tree"

cd "$tree"
RNNKERN_SANITIZE=$kind "$python" setup.py --quiet build_ext --inplace

# The sanitizer's runtime must come first in a Python that was built without it; libstdc++ beside it, or the first C++
# exception ends the process. Python and torch leak at exit by design. --capture=sys lets the reports through.
others=()
case $kind in
    address) runtime=libasan.so others=(--ignore=tests/test_bench.py) ;; # OpenVINO, a peer, does not load beside it
    thread) runtime=libtsan.so ;;
    undefined) runtime=libubsan.so ;;
esac
export ASAN_OPTIONS=detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}
export PYTHONPATH=$tree PYTHONMALLOC=malloc
library() { "${CXX:-g++}" -print-file-name="$1"; }
# What a test compiles of our sources has the sanitizer too, where it asks for CXXFLAGS.
CXXFLAGS="-fsanitize=$kind -g" LD_PRELOAD="$(library $runtime) $(library libstdc++.so)" "$python" -m pytest --capture=sys "${others[@]}" "$@"

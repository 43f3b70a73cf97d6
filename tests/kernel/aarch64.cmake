# The kernel and its tests for 64-bit Arm, run by qemu-user: cmake -DCMAKE_TOOLCHAIN_FILE=tests/kernel/aarch64.cmake ...
# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static) # so that qemu needs no libraries of that machine

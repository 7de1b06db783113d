/* Stands in for libcuda.so.1: a driver that lacks most functions. */
int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuCtxSynchronize(void) { return 916; /* newer than CUDA 11.4 */ }

/* Writes what it was given to `extra`, so that every argument's way can be checked. */
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    unsigned long *out = (unsigned long *)extra;
    unsigned long all[] = {(unsigned long)function, gx, gy, gz, bx, by, bz, shared, (unsigned long)stream,
                           (unsigned long)params};
    for (int i = 0; i < 10; i++) out[i] = all[i];
    return 0;
}

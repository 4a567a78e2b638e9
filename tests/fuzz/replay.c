/* replay.c: runs the fuzz target over files, where there is no libFuzzer: cc replay.c fuzz_gguf.c ...; ./replay FILE... */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (!f || fseek(f, 0, SEEK_END) != 0) {
            perror(argv[i]);
            return 1;
        }
        size_t size = (size_t)ftell(f);
        uint8_t *data = malloc(size ? size : 1); /* of the exact size, so that a read past the end is seen */
        rewind(f);
        if (!data || fread(data, 1, size, f) != size) {
            perror(argv[i]);
            return 1;
        }
        LLVMFuzzerTestOneInput(data, size);
        free(data);
        fclose(f);
    }
    printf("replay: %d files\n", argc - 1);
    return 0;
}

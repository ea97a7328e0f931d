/* A program of two files, for the first command of the README. */
#include <stdio.h>

#include "greeting.h"

int main(void)
{
    return puts(GREETING) == EOF;
}

#ifndef GREETING
#define GREETING "Hello from inside the cofferdam."
#endif
